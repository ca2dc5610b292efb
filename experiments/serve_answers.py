"""Are a server's answers those of `generate`, whole and streamed, dense and pruned, by HTTP and by the openai package?

python experiments/serve_answers.py --pruned embedded --prompts 200
"""

import argparse
import random

from openai import OpenAI

from ftp_lightning import load_pruned
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.studies.served import Server, generated


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pruned", default="embedded", help="a ready-made pruner; its base model is served")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new_tokens", type=int, default=12)
    asked, draw = parser.parse_args(), random.Random(0)
    model, tokenizer = load_pruned(asked.pruned)
    pruner = model.pruner.changed(least_tokens=0)
    model.pruner.detach()
    words = " ".join(load_documents("embedded", "test")).split()

    different = changed = 0
    with Server("--pruned", asked.pruned) as server:
        openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for _ in range(asked.prompts):
            start = draw.randrange(len(words) - 300)
            prompt, right = " ".join(words[start : start + draw.randrange(8, 120)]), {}
            for mode in ("off", "always"):
                attached = pruner if mode == "always" else None
                ids, fields = prompt_ids(tokenizer, prompt), {"max_tokens": asked.new_tokens, "ftp_mode": mode}
                right[mode] = generated(model, tokenizer, attached, ids, asked.new_tokens)
                by_package = openai.completions.create(
                    model=asked.pruned, prompt=prompt, temperature=0, max_tokens=asked.new_tokens,
                    extra_body={"ftp_mode": mode},
                )  # fmt: skip
                found = [
                    server.ask(prompt, **fields)["choices"][0]["text"],
                    server.streamed(prompt, **fields),
                    by_package.choices[0].text,
                ]
                for text in found:
                    if text != right[mode]:
                        different += 1
                        print(f"{mode}: {text!r} in place of {right[mode]!r}, of {prompt!r}", flush=True)
            changed += right["off"] != right["always"]
    print(f"{different} of {6 * asked.prompts} answers differ from generate's")
    print(f"pruning changes {changed} of {asked.prompts}")


if __name__ == "__main__":
    main()
