"""`python -m ftp_lightning.models`: convert the named models that are installed, and say where each is."""

from ftp_lightning.models.named import NAMED, locate, title

for name in NAMED:
    print(f"{name}: {title(name)}, {locate(name)}")
