"""Any stage under a launcher that wants a file: `fabric run --devices 2 -- experiments/launch.py search --budget 0.3`.

torchrun --nproc-per-node 2 experiments/launch.py STAGE …       (or: torchrun … -m ftp_lightning STAGE …)
fabric run --accelerator cpu --devices 2 -- experiments/launch.py STAGE …
srun python experiments/launch.py STAGE …                       (or: srun python -m ftp_lightning STAGE …)
python experiments/launch.py STAGE …
"""

import sys

from ftp_lightning.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
