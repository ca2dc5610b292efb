"""Does a server's memory grow? Whole, streamed, pruned, sampled and refused requests; RSS of all its processes.

python experiments/serve_memory.py --model random:tiny --requests 5000
"""

import argparse
import random
from concurrent.futures import ThreadPoolExecutor

from ftp_lightning.studies.served import Server

WORDS = "the boy saw a small red house by the sea and the old man told him of ships and gold".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:tiny")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--parts", type=int, default=10, help="how often the memory is read")
    asked = parser.parse_args()
    with Server("--model", asked.model, "--budget", "0.3") as server:

        def ask(number: int) -> bool:
            draw = random.Random(number)
            prompt = f"{number} " + " ".join(draw.choices(WORDS, k=draw.randrange(5, 60)))
            fields = {"max_tokens": 4, "ftp_mode": draw.choice(["off", "always"]), "temperature": draw.choice([0, 1])}
            if number % 5 == 0:
                return bool(server.streamed(prompt, **fields))
            if number % 5 == 1:  # refused
                return server.client.post("/v1/completions", json={"prompt": prompt, "n": 2}).status_code == 400
            return server.ask(prompt, **fields)["usage"]["completion_tokens"] > 0

        part, told = asked.requests // asked.parts, []
        with ThreadPoolExecutor(asked.clients) as pool:
            for start in range(0, asked.requests, part):
                good = sum(pool.map(ask, range(start, start + part)))
                told.append(server.memory())
                print(f"{start + part} requests, {good} of {part} answered: {told[-1]:.1f} MB", flush=True)
        grown = told[-1] / told[1] - 1
        print(f"from {2 * part} requests to {asked.requests}: {100 * grown:+.2f} %")


if __name__ == "__main__":
    main()
