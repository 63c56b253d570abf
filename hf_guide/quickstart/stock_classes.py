"""Load a saved classifier with Transformers alone and classify texts: a script for a process of its own.

Reads JSON {"folder", "texts", "length"} from standard input and writes JSON {"logits", "labels"}.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Do as the module says; exits with a message if hf_guide was loaded along the way."""
    asked = json.load(sys.stdin)
    model: Any = AutoModelForSequenceClassification.from_pretrained(asked["folder"])
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    batch = tokenizer(asked["texts"], truncation=True, max_length=asked["length"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    if any(name.split(".")[0] == "hf_guide" for name in sys.modules):
        raise SystemExit("The saved student does not load without hf_guide.")
    names = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    json.dump({"logits": logits.tolist(), "labels": names}, sys.stdout)


if __name__ == "__main__":
    main()
