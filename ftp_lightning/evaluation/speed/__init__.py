"""Time and memory of prefill and decoding, and the limits that FLOPs and shapes set."""
