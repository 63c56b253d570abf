"""What a projection of the residual stream does not preserve exactly: notes that several families share."""

SANDWICH_NORM_NOTE = (
    "gains after each branch are folded into the weights before their norm, whose input they lengthen: "
    "logits off by {} on a rotated residual stream of width 40, gains at 1 +- 0.3"
)

POST_NORM_NOTE = (
    "post-norm: gains become diagonals: logits off by {} on a rotated residual stream, gains at 1 +- 0.3; by {} behind the "
    "masked-language head, whose GELU does not commute with a projection"
)

STREAM_NORM_NOTE = "the gains of {} become diagonals: logits off by {} on a rotated residual stream, gains at 1 +- 0.3"

IMAGE_NORM_NOTE = (
    "the gain of the embeddings' norm becomes a diagonal: outputs off by 15 % on a rotated residual "
    "stream, gains at 1 +- 0.3"
)
