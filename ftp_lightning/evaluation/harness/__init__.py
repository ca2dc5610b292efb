"""lm-eval: the model `ftp`, the tasks with their files, and the answers they give."""
