"""Fit what is after the last block: a tied embedding table, the final norm before it, and one scale of all logits."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_guide.calibration.batches import Batch, count_rows, first_rows, unpadded_ids
from hf_guide.calibration.forward import drop_padding
from hf_guide.calibration.least_squares import max_eps, row_chunks
from hf_guide.calibration.modules import ModuleRef, linear_weight, module_bias, norm_weight
from hf_guide.calibration.normal_equations import (
    NormalEquations,
    NormalEquationSums,
    append_bias_column,
    at_least_float32,
)
from hf_guide.calibration.output_comparison import NUMBERS_AT_A_TIME
from hf_guide.calibration.refit import RefitState, assign_checked
from hf_guide.calibration.sequential import SequentialModel
from hf_guide.errors import ShapeError
from hf_guide.models.hooks import StopForward, register_input_hook, removable_hooks
from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size
from hf_guide.utils.finite import overflow_advice
from hf_guide.utils.memory import return_freed_memory

LOGIT_SCALE_TOKENS = 1024
"""Tokens on which the logit scale is fitted: it is one number, and each token costs a product with the vocabulary."""

TOKENS_AT_A_TIME = 128
"""Tokens whose logits the student's head computes together."""

MULTIPLIER_TOKENS = 16
"""Tokens whose logits are compared with the head's output."""

NEWTON_STEPS = 8
EMBEDDING_WEIGHT, MIN_TOKEN_FREQUENCY = 0.003, 0.1
"""Of `fit_tied_embedding`: the weight of a token's embedding error at an even frequency, and the least relative frequency."""


def find_head(state: RefitState) -> "HeadFitter | None":
    """Return the fitter of the head that computes logits over a vocabulary; None if either model has none."""
    for name, ref in state.student_modules.residual_in.items():
        teacher_ref = state.teacher_modules.residual_in.get(name)
        if ref.is_language_head and teacher_ref is not None:
            norms = ref.match.row.input_norms
            is_tied = name + ".weight" in state.plan.tied_parameters
            return HeadFitter(state, ref, teacher_ref, norms[0] if norms else None, is_tied=is_tied)
    return None


class HeadFitter:
    """The student's language head, the teacher's, and the norm before them, by its canonical name (None for no norm)."""

    def __init__(self, state: RefitState, student: ModuleRef, teacher: ModuleRef, norm: str | None, *, is_tied: bool):
        self.state, self.student, self.teacher, self.norm, self.is_tied = state, student, teacher, norm, is_tied

    # A tied embedding

    def fit_tied_embedding(self) -> None:
        """Fit a table that is embedding and head at once to both of its tasks, before blocks are refitted.

        Row v becomes the e that minimises b_v |e - E_v M|^2 / u + mean_t (g e x_t - E_v n_t)^2 / w: the embedding that GUIDE
        transfers, and the logits of the teacher's final hidden states n_t, computed from their projections x_t with a
        constant gain g; u and w are the mean squares of either. b_v is `EMBEDDING_WEIGHT` times the token's frequency in the
        text, relative to an even one, between `MIN_TOKEN_FREQUENCY` and 1. Refitted blocks correct the error of an
        embedding, and nothing after the head corrects that of logits: hence the small weight.
        """
        state, norm = self.state, self.norm
        matrix = state.plan.bases.get(self.student.axis)
        if matrix is None or norm is None or norm not in state.teacher_modules.norms:
            return
        sums: list[NormalEquationSums] = []
        state.teacher_run.finish_all()
        for index in range(len(state.batches)):
            stream, head_inputs = self._final_hidden_states(index)
            stream = at_least_float32(stream)
            projected = stream @ matrix.to(stream)
            if state.plan.layout.norm == "layer":
                projected = projected - projected.mean(-1, keepdim=True)
            projected = projected / projected.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
            self._add(sums, projected, head_inputs)
        has_norm_bias = norm + ".bias" in state.plan.parameters
        gram, cross, _, _ = _mean_products(sums[0].reduce().full(), centered=has_norm_bias)  # (d_S, d_S), (d_T, d_S)
        weight = linear_weight(self.student.module)
        table = state.plan.parameters[state.plan.tied_parameters[self.student.name + ".weight"]]
        if state.plan.teacher.weights.shape(state.plan.teacher_names[table.source or ""])[0] != len(weight):
            return
        rows = self._table_rows(weight, table.source or "", cross)
        products = norms = squares = 0.0
        for _, embedding, logit_products in rows():
            products += (embedding * logit_products).sum().item()
            norms += ((embedding @ gram) * embedding).sum().item()
            squares += embedding.square().sum().item()
        gain, embedding_size = products / norms, squares / len(weight)
        logit_size = norms / len(weight) * gain**2
        counts = count_token_ids(state.batches, len(weight))
        relative_frequency = counts / counts.mean().clamp(min=1e-300)
        share = relative_frequency.clamp(min=MIN_TOKEN_FREQUENCY, max=1.0)[:, None] * EMBEDDING_WEIGHT
        eigenvalues, axes = torch.linalg.eigh(gram)
        for chunk, embedding, logit_products in rows():
            right = share[chunk] * embedding / embedding_size + gain * logit_products / logit_size
            rotated = (right @ axes) / (share[chunk] / embedding_size + gain**2 * eigenvalues[None] / logit_size)
            assign_checked(weight[chunk], rotated @ axes.T, self.student.name + ".weight")
        state.assigned.append(self.student)
        state.transfer.record_step(table, "fitted as embedding and head at once")

    def _table_rows(
        self, weight: Tensor, source: str, cross: Tensor
    ) -> Callable[[], Iterator[tuple[slice, Tensor, Tensor]]]:
        """Return what yields rows of the student's table, and of the teacher's times `cross`, (rows, d_S) float64 each."""

        def rows() -> Iterator[tuple[slice, Tensor, Tensor]]:
            for chunk in row_chunks(len(weight), 8 * weight.shape[1]):  # a fit has many copies of them in memory
                teacher_rows = at_least_float32(self.state.plan.read(source, (chunk.start, chunk.stop)))
                products = (teacher_rows @ cross.to(teacher_rows)).double()
                yield chunk, weight[chunk].detach().double().cpu(), products

        return rows

    # The final norm

    def fit_final_norm(self) -> None:
        """Fit the weight of the norm before a tied head, and its bias, to the teacher's logits, after blocks are refitted.

        It minimises sum_t |E_S (h * n_S) - E_T n_T|^2, less what all tokens of a vocabulary have in common, for the diagonal h
        that multiplies the weight: (A_SS * C_SS) h = diag(A_ST C_TS), with A the second moments of the tables over the
        vocabulary and C those of the final hidden states over the calibration tokens, each without its mean.
        """
        state = self.state
        norm = state.student_modules.norms.get(self.norm or "")
        parameter = state.plan.parameters.get((self.norm or "") + ".weight")
        if norm is None or parameter is None or self.norm is None:
            return
        sums: list[NormalEquationSums] = []
        for index in range(len(state.batches)):
            student_inputs = self._head_inputs(state.student_run, self.student, index)
            self._add(sums, student_inputs, self._head_inputs(state.teacher_run, self.teacher, index))
        has_norm_bias = self.norm + ".bias" in state.plan.parameters
        gram, cross, student_mean, teacher_mean = _mean_products(sums[0].reduce().full(), centered=has_norm_bias)
        student_moment, cross_moment = self._table_moments()
        system, right = student_moment * gram, (cross_moment * cross.T).sum(1)
        at_one = system.sum(1)  # for h = 1: the difference is fitted, so that where nothing is lost nothing changes
        system = system + 1e-6 * system.diagonal().mean() * torch.eye(len(system), dtype=torch.float64)
        diagonal = 1 + torch.linalg.solve(system, right - at_one)
        if (diagonal - 1).abs().max() < max(1e-6, state.eps):
            return  # a rounding error
        offset = state.plan.layout.norm_offset
        gain = norm_weight(norm.module).detach().double().cpu() + offset
        assign_checked(norm_weight(norm.module), gain * diagonal - offset, self.norm + ".weight")
        bias = module_bias(norm.module)
        if has_norm_bias and bias is not None:
            missing = cross_moment @ teacher_mean - student_moment @ (diagonal * student_mean)
            update = torch.linalg.pinv(student_moment, hermitian=True) @ missing
            assign_checked(bias, diagonal * bias.detach().double().cpu() + update, self.norm + ".bias")
        state.transfer.record_step(parameter, "fitted to the logits on the calibration tokens")

    def _table_moments(self) -> tuple[Tensor, Tensor]:
        """Return the second moments of the student's table and of both, without their means, (d_S, d_S) and (d_S, d_T)."""
        tables = [linear_weight(ref.module) for ref in (self.student, self.teacher)]
        rows = min(map(len, tables))
        tables = [table[:rows] for table in tables]
        moments = [torch.zeros(tables[0].shape[1], table.shape[1], dtype=torch.float64) for table in tables]
        means = [torch.zeros(table.shape[1], dtype=torch.float64) for table in tables]
        for chunk in row_chunks(*tables[1].shape):
            parts = [at_least_float32(table[chunk].detach()) for table in tables]
            dtype = torch.promote_types(parts[0].dtype, parts[1].dtype)
            for moment, mean, part in zip(moments, means, parts, strict=True):
                moment += (parts[0].to(dtype).T @ part.to(dtype)).cpu()
                mean += part.sum(0, dtype=torch.float64).cpu() / rows
        for moment, mean in zip(moments, means, strict=True):
            moment -= rows * torch.outer(means[0], mean)
        return moments[0], moments[1]

    # The logit scale

    def fit_logit_scale(self) -> float:
        """Multiply the logits by the s that minimises KL(teacher || softmax(s z_S)); return s.

        Newton's method for one convex variable, from 1.

        Raises:
            ShapeError: Logits are not finite, or the scaled weights are too large for their dtype.
        """
        with chunked_linear(self.student.module), chunked_linear(self.teacher.module):
            return self._fit_logit_scale()

    def _fit_logit_scale(self) -> float:
        multiplier = self._logit_multiplier()
        return_freed_memory()
        if multiplier is None:
            self.state.notes.append(
                "The logit scale is not fitted: the model does more to its head's output than multiply it."
            )
            return 1.0
        inputs, expected_logits = self._logit_scale_data()
        scale = 1.0
        for _ in range(NEWTON_STEPS):
            slope, curvature = self._kl_derivatives(inputs, expected_logits, scale * multiplier)
            return_freed_memory()
            curvature *= multiplier
            if curvature <= 0:
                break
            step = -slope / curvature
            scale = min(max(scale + step, scale / 2), scale * 2)
            if abs(step) < 1e-3:
                break
        if abs(scale - 1) < max(1e-6, self.state.eps / 2):
            return 1.0  # a rounding error: it would change no weight by more than storing it does
        self._scale_logits(scale)
        return scale

    def _logit_scale_data(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for some tokens at a time, the student head's inputs and its mean logit under the teacher's prediction."""
        state, world_size = self.state, rank_and_world_size()[1]
        inputs: list[Tensor] = []
        expected_logits: list[Tensor] = []
        seen = 0
        for index, whole_batch in enumerate(state.batches):
            rows = count_rows(whole_batch, LOGIT_SCALE_TOKENS // world_size - seen, state.teacher, of_decoder=True)
            batch = first_rows(whole_batch, rows)
            student_inputs = self._head_inputs(state.student_run, self.student, index, rows)
            outputs = state.teacher_run.forward(index, rows)
            logits = drop_padding(
                outputs.logits, batch, state.teacher, of_decoder=state.teacher.config.is_encoder_decoder
            )
            for part, teacher_part in zip(
                student_inputs.split(TOKENS_AT_A_TIME), logits.split(TOKENS_AT_A_TIME), strict=True
            ):
                pairs = _few_tokens(self.student.module(part), teacher_part)
                expected_logits.append(torch.cat([_expected_logits(*pair) for pair in pairs]))
                inputs.append(part)
            return_freed_memory()
            seen += len(student_inputs)
            if seen * world_size >= LOGIT_SCALE_TOKENS:
                break
        return inputs, expected_logits

    def _kl_derivatives(
        self, inputs: list[Tensor], expected_logits: list[Tensor], scale: float
    ) -> tuple[float, float]:
        """Return the first derivative of the divergence, and the variance of the logits, summed over all tokens."""
        slope, variance = 0.0, 0.0
        for head_inputs, expected_of_part in zip(inputs, expected_logits, strict=True):
            for logits, expected in _few_tokens(self.student.module(head_inputs), expected_of_part):
                logits = logits.to(expected)
                probabilities = (logits * scale).softmax(-1)
                mean = torch.linalg.vecdot(probabilities, logits)
                slope += (mean - expected).sum().item()
                variance += (torch.linalg.vecdot(probabilities, logits.square()) - mean.square()).sum().item()
        sums = torch.tensor([slope, variance], dtype=torch.float64)
        all_reduce_sum_([sums])
        if not sums.isfinite().all():
            student, teacher = self.state.student.dtype, self.state.teacher.dtype
            advice = overflow_advice(
                min(student, teacher, key=lambda dtype: torch.finfo(dtype).max),
                "Check the teacher's weights and the calibration dataset for extreme values, or pass fit_logit_scale=False",
                "Make the student" if teacher != torch.float16 else "Load the teacher and make the student",
            )
            raise ShapeError(
                f"The logit scale cannot be fitted: the student's logits in {student} or the teacher's in {teacher} are not "
                f"finite on the calibration dataset. {advice}"
            )
        return sums[0].item(), sums[1].item()

    def _scale_logits(self, scale: float) -> None:
        state, norm_name = self.state, self.norm or ""
        if self.is_tied:
            norm = state.student_modules.norms.get(norm_name)
            if norm is None or norm_name + ".weight" not in state.plan.parameters:
                state.notes.append(
                    "The logit scale is not fitted: the head is tied, and the norm before it has no weight."
                )
                return
            offset, gain, norm_bias = state.plan.layout.norm_offset, norm_weight(norm.module), module_bias(norm.module)
            scaled = norm_name + ".weight"
            assign_checked(gain, (gain.double() + offset) * scale - offset, scaled)
            if norm_bias is not None:
                assign_checked(norm_bias, at_least_float32(norm_bias) * scale, norm_name + ".bias")
        else:
            weight = linear_weight(self.student.module)
            scaled = self.student.name + ".weight"
            for rows in row_chunks(*weight.shape):
                assign_checked(weight[rows], at_least_float32(weight[rows]) * scale, scaled)
        bias = module_bias(self.student.module)
        if bias is not None:
            assign_checked(bias, at_least_float32(bias) * scale, self.student.name + ".bias")
        step = f"logits times {scale:.6g}, fitted on the calibration tokens"
        state.transfer.record_step(state.plan.parameters[scaled], step)

    def _logit_multiplier(self) -> float | None:
        """Return what the model multiplies its head's output by (1 but for Granite and the like); None if it does more."""
        state = self.state
        outputs: list[Tensor] = []
        with removable_hooks() as handles:
            handles.append(self.student.module.register_forward_hook(lambda _, args, output: outputs.append(output)))
            logits = state.student_run.forward(0, rows=1).logits
        eps = max_eps(outputs[-1].dtype, logits.dtype)
        head_output, logits = (each.flatten(0, -2)[:MULTIPLIER_TOKENS].double() for each in (outputs[-1], logits))
        multiplier = ((head_output * logits).sum() / head_output.square().sum()).item()
        if (logits - multiplier * head_output).abs().max() > max(1e-4, eps) * logits.abs().max():
            return None
        return 1.0 if abs(multiplier - 1) < 1e-6 else multiplier

    # Activations

    @staticmethod
    def _add(sums: list[NormalEquationSums], x: Tensor, y: Tensor) -> None:
        if not sums:
            sums.append(NormalEquationSums.zeros(x.shape[1] + 1, y.shape[1] + 1))
        sums[0].add(append_bias_column(x, True), append_bias_column(y, True))

    def _final_hidden_states(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the teacher's residual stream before its final norm, and its head's input, (tokens, d_T) each."""
        state = self.state
        recorded: list[Tensor] = []

        def stop(inputs: Tensor) -> None:
            recorded.append(inputs)
            raise StopForward

        with removable_hooks() as handles:
            norm = state.teacher_modules.norms[self.norm or ""].module
            handles.append(register_input_hook(norm, recorded.append))
            handles.append(register_input_hook(self.teacher.module, stop))
            state.teacher_run.forward(index)
        of_decoder = state.teacher.config.is_encoder_decoder
        stream, head_inputs = (
            drop_padding(each, state.batches[index], state.teacher, of_decoder=of_decoder) for each in recorded[-2:]
        )
        return stream, head_inputs

    def _head_inputs(self, run: SequentialModel, ref: ModuleRef, index: int, rows: int | None = None) -> Tensor:
        """Return the input of a head on a batch, or on its first rows, (tokens, d)."""
        inputs = run.capture_input(ref.module, index, rows)
        assert inputs is not None  # it computes the logits
        batch = first_rows(self.state.batches[index], rows)
        return drop_padding(inputs, batch, self.state.teacher, of_decoder=self.state.teacher.config.is_encoder_decoder)


@contextlib.contextmanager
def chunked_linear(module: nn.Module) -> Iterator[None]:
    """Have a head multiply by a part of its rows at a time: for a product in bfloat16 oneDNN copies the weight.

    Example:
        >>> head, inputs = torch.nn.Linear(8, 100), torch.randn(2, 3, 8)
        >>> expected = head(inputs)
        >>> with chunked_linear(head):
        ...     bool(torch.allclose(head(inputs), expected))
        True
    """
    if type(module) is not nn.Linear or "forward" in vars(module):  # Accelerate moves its weight
        yield
        return
    linear = module

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor | None = None
        for rows in row_chunks(linear.out_features, -(-linear.in_features // 4)):
            part = nn.functional.linear(
                inputs, linear.weight[rows], None if linear.bias is None else linear.bias[rows]
            )
            if outputs is None:
                outputs = part.new_empty(*part.shape[:-1], linear.out_features)
            outputs[..., rows] = part
        assert outputs is not None
        return outputs

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


def _few_tokens(logits: Tensor, others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield both, (tokens, ...) each, for so many tokens at a time that of logits, (tokens, V), few are in memory."""
    step = max(1, NUMBERS_AT_A_TIME // logits.shape[-1])
    yield from zip(logits.split(step), others.split(step), strict=True)


def _expected_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of the student's logits under the teacher's prediction, (tokens,), over the tokens of both."""
    columns = min(student.shape[-1], teacher.shape[-1])
    probabilities = at_least_float32(teacher[:, :columns]).softmax(-1)
    return torch.linalg.vecdot(probabilities, student[:, :columns].to(probabilities))


def _mean_products(total: NormalEquations, *, centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean products x^T x and y^T x of rows with a one appended, and the means of x and y."""
    tokens = total.gram[-1, -1]
    mean_x, mean_y = total.gram[-1, :-1] / tokens, total.cross[:-1, -1] / tokens
    gram, cross = total.gram[:-1, :-1] / tokens, total.cross[:-1, :-1] / tokens
    if centered:
        gram, cross = gram - torch.outer(mean_x, mean_x), cross - torch.outer(mean_y, mean_x)
    return gram, cross, mean_x, mean_y


def count_token_ids(batches: Sequence[Batch], vocab_size: int) -> Tensor:
    """Return how often each token is in this process's batches and the others', padding excluded, (V,) float64.

    Example:
        >>> count_token_ids([{"input_ids": torch.tensor([[1, 1, 2]])}], vocab_size=4).tolist()
        [0.0, 2.0, 1.0, 0.0]
    """
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        if "input_ids" in batch:
            counts += torch.bincount(unpadded_ids(batch), minlength=vocab_size)[:vocab_size]
    all_reduce_sum_([counts])
    return counts
