"""How many of Transformers' causal language models can be a teacher, and how exactly.

For every architecture of the causal-LM mapping that can be built from its default config, a tiny model (the same
switches, small sizes, float64, parameters drawn at random) becomes a teacher. Printed are the error of the identity law
(same config in, same logits out), where the layout came from (table, inferred, or blocks only), and whether a student of
half the width can be made and runs.

    python examples/benchmarks/architectures.py [--output architectures.jsonl] [ARCHITECTURE ...]
"""

import argparse
import json
import sys
import warnings
from collections import Counter

import torch
import transformers
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_guide.errors import HfGuideError
from hf_guide.initialization.equivalence import relative_logit_error
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.layouts.registry import registered_layouts
from hf_guide.modeling import from_teacher
from hf_guide.models.tiny_models import MODEL_ERRORS, TINY_SIZES, build_tiny_model, randomize_parameters, tiny_config


def survey(architecture: str) -> dict:
    """Return the results of one architecture; `built` is false if its default config builds no model."""
    result: dict = {
        "architecture": architecture,
        "built": False,
        "identity": None,
        "layout": None,
        "narrower": None,
        "note": "",
    }
    try:
        config = CONFIG_MAPPING[architecture]()
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            model_class._from_config(config)
    except MODEL_ERRORS as error:
        return result | {"note": f"default config: {type(error).__name__}: {error}"}
    result["built"] = True
    try:
        teacher = build_tiny_model(model_class, tiny_config(config))
        randomize_parameters(teacher, seed=0)
        teacher(input_ids=torch.arange(3, 14)[None])
    except MODEL_ERRORS as error:
        return result | {"note": f"no tiny model: {type(error).__name__}: {error}"}
    layout = layout_for(teacher.config, model_class)
    kind = "table" if config.model_type in registered_layouts() else layout.exactness.partition(":")[0]
    result |= {"layout": kind, "exactness": layout.exactness}
    try:
        student = from_teacher(teacher, show_progress=False)
        result["identity"] = relative_logit_error(_alike(student), teacher)
    except (HfGuideError, *MODEL_ERRORS) as error:
        result["note"] = f"identity: {error}"
    result["narrower"] = None if kind.startswith("blocks") else False
    for sizes in (
        ()
        if kind.startswith("blocks")
        else (
            {},
            {"head_dim": 16},
            {"num_attention_heads": 2, "num_key_value_heads": 1},
            {"num_attention_heads": 2, "num_key_value_heads": 2},
        )
    ):
        try:
            narrow = tiny_config(
                teacher.config, **{name: 32 for name, size in TINY_SIZES.items() if size == 64}, **sizes
            )
            student = _alike(from_teacher(teacher, narrow, show_progress=False))
            result["narrower"] = bool(torch.isfinite(student(input_ids=torch.arange(3, 14)[None]).logits).all())
            break
        except (HfGuideError, *MODEL_ERRORS) as error:
            result["note"] = f"narrower: {error}"
    return result


def _alike(student):
    student.set_attn_implementation("eager")
    student.set_experts_implementation("eager")
    return student.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", help="model types; all of the causal-LM mapping if none is named")
    parser.add_argument("--output", help="where to write a JSON line for each architecture")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the largest logit, for the identity law")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    with torch.no_grad():
        for architecture in tqdm(args.architectures or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), unit="architecture"):
            rows.append(survey(architecture))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        error = "-" if row["identity"] is None else f"{row['identity']:.0e}"
        note = " ".join(row["note"].split())[:110]
        name, layout = row["architecture"], row["layout"] or "-"
        print(f"{name:28} {layout:28} identity {error:6} narrower {row['narrower']!s:6} {note}")
    built = [row for row in rows if row["built"]]
    holds = [row for row in built if row["identity"] is not None and row["identity"] <= args.tolerance]
    wide = [row for row in holds if row["narrower"]]
    print(f"\npython {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{len(rows)} architectures, {len(built)} can be built from their default config here.")
    print(
        f"Identity holds to {args.tolerance:g} for {len(holds)} of these ({len(holds) / max(1, len(built)):.0%}); "
        f"layouts: {dict(Counter(row['layout'] for row in holds))}."
    )
    print(f"Narrower students, too, can be made of {len(wide)} ({len(wide) / max(1, len(built)):.0%}).")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
