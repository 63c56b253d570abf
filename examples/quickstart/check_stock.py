"""Load a saved student with Transformers alone, in a process of its own, and run it.

Reads JSON from standard input and writes JSON to standard output:

    {"folder", "prompt", "tokens"}   -> {"text", "perplexity", "parameters"}   a causal language model
    {"folder", "images"}             -> {"logits", "labels"}                   an image classifier

Exits with a message if hf_guide was imported on the way.
"""

import json
import math
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer


def run_language_model(folder: str, prompt: str, tokens: list[int]) -> dict[str, Any]:
    """Score `tokens` and continue `prompt`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    inputs = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
    return {
        "text": tokenizer.decode(generated[0], skip_special_tokens=True),
        "perplexity": math.exp(loss.item()),
        "parameters": model.num_parameters(),
    }


def run_classifier(folder: str, images: list[Any]) -> dict[str, Any]:
    """Classify `images`, (images, channels, height, width) as nested lists."""
    model: Any = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(pixel_values=torch.tensor(images)).logits
    labels = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    return {"logits": logits.tolist(), "labels": labels}


def main() -> None:
    """Run the request on standard input."""
    request = json.load(sys.stdin)
    answer = (run_classifier if "images" in request else run_language_model)(**request)
    if any(name.split(".")[0] == "hf_guide" for name in sys.modules):
        raise SystemExit("The saved student does not load without hf_guide.")
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
