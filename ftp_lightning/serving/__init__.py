"""An OpenAI-compatible server on LitServe, and the export of a pruned model as a folder that transformers serves.

A request goes this way: `app` (HTTP) -> `fields` (what may be asked) -> `prompts` (token ids) -> LitServe's queue ->
`worker` (a process with the model) -> `plan` (which pruner) -> `engine` (one batch) -> `answers` (OpenAI's shapes).
"""
