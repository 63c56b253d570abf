"""Chat and instruction data: rows of messages, or of prompts and completions, as token ids with labels."""
