"""Measuring a pruned model: continuation KL and perplexity, lm-eval tasks, statistics, speed.

Importing this package registers the lm-eval model `ftp`: by name only, nothing heavy is loaded before it is used.
"""


def _register() -> None:
    import lm_eval.models  # noqa: F401  lm-eval lists its own models only while its registry is empty
    from lm_eval.api.registry import model_registry

    if "ftp" not in model_registry:
        model_registry.register("ftp", target="ftp_lightning.evaluation.harness.model:FtpLM")


_register()
