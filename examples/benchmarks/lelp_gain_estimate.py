"""Is the forecast of `hf-guide subclasses` right? Against what `lelp_comparison.py` measured, arm by arm.

    python examples/benchmarks/lelp_comparison.py --sets digits -o results
    python examples/benchmarks/lelp_gain_estimate.py --sets digits -o results          # the same options

For each set and arm of subclasses: what tiny students gain over KD on pixels, or on the mean of a text's input embeddings,
beside how much of the finer labels the subclasses know, and what students gained on the test part. Last, over all of them,
the correlation of ranks and how often a recommended arm was below KD. Forecasts are made on the examples that students
learn from; the test part is not looked at.
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
    """Return what a student could know without the teacher, (N, F)."""
    if not batches.data.is_text:
        return torch.nn.functional.adaptive_avg_pool2d(
            batches.data.inputs, min(14, batches.data.inputs.shape[-1])
        ).flatten(1)
    table = teacher.encoder.get_input_embeddings()

    def mean(inputs: dict[str, Tensor]) -> tuple[Tensor]:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return ((table(inputs["input_ids"]) * mask).sum(1) / mask.sum(1),)

    return batches.of_each(mean)[0]


def known(targets: Tensor, data: Labelled) -> float:
    """Return the share of the finer labels, beyond the class, that the likeliest subclasses know; NaN without any."""
    if data.finer is None:
        return float("nan")
    chosen = targets[torch.arange(len(targets)), data.labels].argmax(1)
    return label_mutual_information(chosen, data.labels, data.finer).share


def ranks(values: list[float]) -> Tensor:
    """Return the rank of each value, 0 the smallest."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def main() -> int:
    args = parser(__doc__).parse_args()
    runs = Runs.of(args)
    pairs: list[tuple[GainEstimate, float, float]] = []
    for name in args.sets:
        bench = prepare(name, args)
        batches, lesson = bench.lesson(args.transfer, args.share)
        features, common = features_of(batches, bench.teacher), plan(name, batches.data.is_text, args)
        _, plain = runs.within(common, "kd")
        for arm in (*ORACLES, *SPLITTERS):
            settings, found = runs.within(common, arm)
            gains = [100 * (found[seed]["test"] - plain[seed]["test"]) for seed in found if seed in plain]
            if settings is None or len(gains) < 2:
                continue
            targets = targets_of(arm, lesson, settings)
            told = estimate_gain_from_targets(
                targets,
                lesson.signals.logits,
                features,
                lesson.data.labels,
                temperature=settings["tau"],
            )
            spread = statistics.stdev(gains)
            pairs.append((told, statistics.mean(gains), spread))
            print(
                f"{name:18} {arm:18} forecast {told.gain:+5.2f} ± {told.gain_error:.2f} (shuffled {told.shuffled:+5.2f}, "
                f"predictable {told.predictability:4.0%}, knows {known(targets, lesson.data):4.0%})  "
                f"measured {statistics.mean(gains):+5.2f} ± {spread:.2f}  {told.verdict}",
                flush=True,
            )
    if len(pairs) > 2:
        both = torch.stack([ranks([told.gain for told, _, _ in pairs]), ranks([gain for _, gain, _ in pairs])])
        worse = sum(told.recommended and gain < -spread for told, gain, spread in pairs)
        print(
            f"{len(pairs)} arms: correlation of ranks {torch.corrcoef(both)[0, 1]:.2f}; "
            f"{sum(told.recommended for told, _, _ in pairs)} recommended, {worse} of them below KD beyond the spread"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
