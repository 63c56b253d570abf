"""Is the gain that `hf-guide analyze-subclasses` estimates right? Against what `lelp_comparison.py` measured, arm by arm.

    python examples/benchmarks/lelp_comparison.py --sets digits -o results
    python examples/benchmarks/lelp_gain_estimate.py --sets digits -o results          # the same options

For each set and arm of subclasses: what probes gain over KD on pixels, or on the mean of a text's input embeddings, the
mutual information of subclasses and fine labels, and what students gained on the test part. Last, over all arms, the rank
correlation and how often a recommended arm was below KD. Estimates are made on the examples that students learn from; they do
not read the test part.
"""

import statistics

import torch
from lelp_comparison import Runs, parser, plan, prepare
from lelp_data import Labelled
from lelp_models import Batches, Classifier
from lelp_training import ORACLES, SPLITTERS, targets_of
from torch import Tensor

from hf_guide.lelp.analysis.probe import GainEstimate, estimate_gain_from_targets
from hf_guide.lelp.analysis.report import label_mutual_information


def features_of(batches: Batches, teacher: Classifier) -> Tensor:
    """Return features of the inputs alone, (N, F)."""
    if not batches.data.is_text:
        return torch.nn.functional.adaptive_avg_pool2d(
            batches.data.inputs, min(14, batches.data.inputs.shape[-1])
        ).flatten(1)
    table = teacher.encoder.get_input_embeddings()

    def mean(inputs: dict[str, Tensor]) -> tuple[Tensor]:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return ((table(inputs["input_ids"]) * mask).sum(1) / mask.sum(1),)

    return batches.of_each(mean)[0]


def adjusted_information(targets: Tensor, data: Labelled) -> float:
    """Return the share of the fine labels' entropy that subclasses explain, adjusted for chance; NaN without fine labels."""
    if data.fine_labels is None:
        return float("nan")
    subclasses = targets[torch.arange(len(targets)), data.labels].argmax(1)
    return label_mutual_information(subclasses, data.labels, data.fine_labels).adjusted


def ranks(values: list[float]) -> Tensor:
    """Return the rank of each value, 0 the smallest."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def main() -> int:
    args = parser(__doc__).parse_args()
    runs = Runs.of(args)
    pairs: list[tuple[GainEstimate, float, float]] = []
    for name in args.sets:
        bench = prepare(name, args)
        batches, problem = bench.problem(args.transfer, args.share)
        features, common = features_of(batches, bench.teacher), plan(name, batches.data.is_text, args)
        _, kd_results = runs.within(common, "kd")
        for arm in (*ORACLES, *SPLITTERS):
            settings, results = runs.within(common, arm)
            gains = [
                100 * (results[seed]["test"] - kd_results[seed]["test"]) for seed in results if seed in kd_results
            ]
            if settings is None or len(gains) < 2:
                continue
            targets = targets_of(arm, problem, settings)
            estimate = estimate_gain_from_targets(
                targets,
                problem.signals.logits,
                features,
                problem.data.labels,
                temperature=settings["tau"],
            )
            spread = statistics.stdev(gains)
            pairs.append((estimate, statistics.mean(gains), spread))
            print(
                f"{name:18} {arm:18} estimate {estimate.gain:+5.2f} ± {estimate.gain_error:.2f} "
                f"(shuffled {estimate.shuffled:+5.2f}, predictable {estimate.predictability:4.0%}, "
                f"fine labels {adjusted_information(targets, problem.data):4.0%})  "
                f"measured {statistics.mean(gains):+5.2f} ± {spread:.2f}  {estimate.verdict}",
                flush=True,
            )
    if len(pairs) > 2:
        both = torch.stack([ranks([estimate.gain for estimate, _, _ in pairs]), ranks([gain for _, gain, _ in pairs])])
        worse = sum(estimate.recommended and gain < -spread for estimate, gain, spread in pairs)
        print(
            f"{len(pairs)} arms: correlation of ranks {torch.corrcoef(both)[0, 1]:.2f}; "
            f"{sum(estimate.recommended for estimate, _, _ in pairs)} recommended, {worse} of them below KD beyond the spread"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
