"""The command line: settings classes become flags, YAML keys and help; progress and estimates are told here."""
