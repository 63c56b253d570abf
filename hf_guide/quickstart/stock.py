"""Load a saved student with Transformers alone, score tokens, continue a prompt: a script for a process of its own.

Reads JSON {"folder", "prompt", "tokens"} from standard input and writes JSON {"text", "perplexity", "parameters"}.
"""

import json
import math
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Do as the module says; exits with a message if hf_guide was loaded along the way."""
    asked = json.load(sys.stdin)
    model: Any = AutoModelForCausalLM.from_pretrained(asked["folder"])
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    tokens = torch.tensor([asked["tokens"]])
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    prompt = tokenizer(asked["prompt"], return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
    if any(name.split(".")[0] == "hf_guide" for name in sys.modules):
        raise SystemExit("The saved student does not load without hf_guide.")
    answer = {
        "text": tokenizer.decode(written[0], skip_special_tokens=True),
        "perplexity": math.exp(loss.item()),
        "parameters": model.num_parameters(),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
