"""Faults for the Triton kernels of a block's layers, each of which their tests have to catch."""

from __future__ import annotations

from tests.seeded_faults import Fault

_SELF_ATTENTION = "crossvit_kernels/self_attention/triton_kernels.py"
_SELF_ATTENTION_LAUNCH = "crossvit_kernels/self_attention/triton_launch.py"
_LINEAR = "crossvit_kernels/linear/triton_kernels.py"
_LINEAR_ROWS = "crossvit_kernels/linear/triton_rows.py"
_LINEAR_LAUNCH = "crossvit_kernels/linear/triton_launch.py"
_LINEAR_TABLE = "crossvit_kernels/linear/triton_table.py"
_PATCHES = "crossvit_kernels/patch_embed/triton_kernels.py"
_PATCHES_LAUNCH = "crossvit_kernels/patch_embed/triton_launch.py"

ATTENTION_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the sum of the softmax is not rescaled when the largest score grows",
            _SELF_ATTENTION,
            "total = total * shrink + tl.sum(p, 1)",
            "total = total + tl.sum(p, 1)",
        ),
        (
            "the result is not rescaled when the largest score grows",
            _SELF_ATTENTION,
            "y * shrink[:, None]",
            "y",
        ),
        (
            "keys behind the last count as zeros",
            _SELF_ATTENTION,
            'scores = tl.where((n < tokens)[None, :], scores, float("-inf"))',
            "scores = scores + 0.0",
        ),
        (
            "keys behind the last have a probability backward",
            _SELF_ATTENTION,
            "p = tl.where((n < tokens)[None, :], p, 0.0)",
            "p = p + 0.0",
        ),
        (
            "the log-sum-exp lacks the logarithm of the sum",
            _SELF_ATTENTION,
            "largest * scale + tl.log2(total)",
            "largest * scale",
        ),
        (
            "the softmax's gradient lacks D for the queries",
            _SELF_ATTENTION,
            "(p * (dp - product[:, None]))",
            "(p * dp)",
        ),
        (
            "the softmax's gradient lacks D for the keys",
            _SELF_ATTENTION,
            "(p * (dp - product[None, :]))",
            "(p * dp)",
        ),
        ("the queries' gradient lacks the scale", _SELF_ATTENTION, "dq * factor", "dq"),
        ("the keys' gradient lacks the scale", _SELF_ATTENTION, "dk * factor", "dk"),
        (
            "the values' gradient is weighed by the gradient of the scores",
            _SELF_ATTENTION,
            "dv = tl.dot(p.to(DTYPE), grad, dv",
            "dv = tl.dot((p * dp).to(DTYPE), grad, dv",
        ),
        (
            "channels of the next head fill the tile",
            _SELF_ATTENTION,
            "mask=there, other=0.0",
            "mask=(n < tokens)[:, None] & (d < D_TILE)[None, :], other=0.0",
        ),
        (
            "every head is the first",
            _SELF_ATTENTION,
            "head_of_batch % heads, tl.program_id(0)",
            "head_of_batch % 1, tl.program_id(0)",
        ),
        (
            "the log-sum-exp of an image is that of the one before",
            _SELF_ATTENTION,
            "lse + (image * heads + head) * tokens + n",
            "lse + (image // 2 * heads + head) * tokens + n",
        ),
        (
            "the last tile is half as long as it has to be",
            _SELF_ATTENTION_LAUNCH,
            "triton.next_power_of_2(max(16, rest))",
            "max(16, triton.next_power_of_2(rest) // 2)",
        ),
        (
            "strides of the channels are taken for one",
            _SELF_ATTENTION,
            "+ d[None, :] * stride_channel, mask",
            "+ d[None, :], mask",
        ),
    )
)

LINEAR_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "merged statistics lack what lies between the means of the parts",
            _LINEAR,
            "mask=there, other=0.0) + away * away * count",
            "mask=there, other=0.0)",
        ),
        (
            "the last part of the statistics counts as wide as the others",
            _LINEAR,
            "count = tl.minimum(channels - i * PART, PART)",
            "count = PART",
        ),
        (
            "the variance lacks eps",
            _LINEAR,
            "tl.rsqrt(squares / channels + eps)",
            "tl.rsqrt(squares / channels)",
        ),
        (
            "statistics for the next layer are squares about zero",
            _LINEAR,
            "counted - (sums / count)[:, None]",
            "counted",
        ),
        (
            "GELU is off by a ten thousandth",
            _LINEAR,
            "return p * clipped + 0.5",
            "return p * clipped + 0.4999",
        ),
        (
            "GELU far below zero is not zero",
            _LINEAR,
            "tl.where(z < -_LIMIT, 0.0, z * _phi(z))",
            "z * _phi(z)",
        ),
        (
            "GELU's derivative lacks its second term",
            _LINEAR,
            "return _phi(z) + z * (0.3989422804014327",
            "return _phi(z) + 0.0 * (0.3989422804014327",
        ),
        ("ReLU has a slope at zero", _LINEAR, "tl.where(z <= 0.0, 0.0, 1.0)", "tl.where(z < 0.0, 0.0, 1.0)"),
        (
            "the mean stays in the product",
            _LINEAR,
            "(value - mean[:, None] * by_column[None, :]) * rstd[:, None]",
            "value * rstd[:, None]",
        ),
        (
            "what is saved went through the activation",
            _LINEAR,
            "_store(z, value, row",
            "_store(z, activate(value, ACTIVATION), row",
        ),
        (
            "the gradient of a LayerNorm lacks m1",
            _LINEAR,
            "value = value - means[0][:, None] - x",
            "value = value - x",
        ),
        (
            "the gradient of a LayerNorm lacks m2",
            _LINEAR,
            "x * means[1][:, None]",
            "0.0 * x",
        ),
        (
            "m2 is of z with its bias",
            _LINEAR,
            "before - tl.load(bias + n, mask=inside, other=0.0)[None, :]",
            "before",
        ),
        (
            "an image has the drop-path of another",
            _LINEAR,
            "scale + m // of_scale",
            "scale + (m + 1) // of_scale",
        ),
        ("the weight's gradient keeps the mean", _LINEAR, "if MEANS:", "if MEANS and False:"),
        ("the bias' gradient is another column's", _LINEAR, "(c >= 3) & (c < 6)", "(c >= 4) & (c < 6)"),
        (
            "one part of the rows is left out",
            _LINEAR,
            "for part in range(parts):",
            "for part in range(1, parts):",
        ),
        (
            "parts of the rows overlap",
            _LINEAR,
            "range(first, tl.minimum(first + of_part, rows), STEP)",
            "range(first, rows, STEP)",
        ),
        (
            "the gradient of gamma is summed with its own factor",
            _LINEAR,
            "_sum_of_products(total, w, 0)",
            "_sum_of_products(total, w * 0.9, 0)",
        ),
        (
            "the mean is that of the padded row",
            _LINEAR_ROWS,
            "mean = (of_row / channels)[:, None]",
            "mean = (of_row / BLOCK)[:, None]",
        ),
        (
            "beta is left out of the bias",
            _LINEAR_ROWS,
            "shift += w * tl.load(beta",
            "shift += 0.0 * tl.load(beta",
        ),
        (
            "the bias is left out where gamma is folded",
            _LINEAR_ROWS,
            "moved += tl.load(bias",
            "moved += 0.0 * tl.load(bias",
        ),
        ("dz' is not scaled", _LINEAR_ROWS, "factor *= rstd", "factor *= 1.0"),
        (
            "m1 is of all columns alike",
            _LINEAR_ROWS,
            "m1 += counted * tl.load(colsum + j, mask=j < outputs, other=0.0)[None, :]",
            "m1 += counted * tl.load(colsum, mask=start < outputs, other=0.0)",
        ),
        (
            "float32 rows are multiplied before they are normalised",
            _LINEAR_LAUNCH,
            "return x.dtype == weight.dtype == torch.bfloat16",
            "return x.dtype == weight.dtype",
        ),
        (
            "a last tile of half the width is taken where it is too narrow",
            _LINEAR_TABLE,
            "0 < columns % self.columns <= half else 0",
            "0 < columns % self.columns else 0",
        ),
    )
)
PATCH_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the CLS token stays without its position",
            _PATCHES,
            "at = position + n[:, None] *",
            "at = position + tl.maximum(n, 1)[:, None] *",
        ),
        (
            "patches behind convolutions are one too late",
            _PATCHES,
            "(n - 1).to(tl.int64)",
            "tl.maximum(n - 2, 0).to(tl.int64)",
        ),
        (
            "the CLS token has a bias",
            _PATCHES,
            "slices[i] + of_patch[None, :], added[None, :])",
            "slices[i] + of_patch[None, :], (of_patch + added)[None, :])",
        ),
        (
            "patches have the position before theirs",
            _PATCHES,
            "(m % tokens)[:, None] * stride_position",
            "(tl.maximum(m % tokens, 1) - 1)[:, None] * stride_position",
        ),
        ("patches begin one too late", _PATCHES, "tl.maximum(token % tokens - 1, 0)", "token % tokens"),
        (
            "a patch is turned over its diagonal",
            _PATCHES,
            "k // SIDE % SIDE, k % SIDE\n",
            "k % SIDE, k // SIDE % SIDE\n",
        ),
        (
            "lines are interpolated with the weights in reverse",
            _PATCHES,
            "line_weights + up * height",
            "line_weights + (3 - up) * height",
        ),
        (
            "pixels are interpolated with the weights in reverse",
            _PATCHES,
            "pixel_weights + left * width",
            "pixel_weights + (3 - left) * width",
        ),
        ("bytes keep their mean", _PATCHES, " + tl.load(levels + planes + plane)", ""),
        (
            "cut patches lie in the row before theirs",
            _PATCHES,
            "row = b * tokens + 1 + patch",
            "row = b * tokens + patch",
        ),
        (
            "lines of a cut patch lie side by side",
            _PATCHES,
            "(i % SIDE * SIDE)[:, None]",
            "(i % SIDE)[:, None]",
        ),
        (
            "runs of pixels are taken for longer than they are",
            _PATCHES_LAUNCH,
            "return math.gcd(8, side, *(image.stride(i) for i in range(3) if image.shape[i] > 1))",
            "return 8",
        ),
        (
            "the window of a line is too narrow",
            _PATCHES_LAUNCH,
            "places[0, :seen], places[3, :seen]",
            "places[0, :seen], places[0, :seen] - 32",
        ),
        (
            "the CLS tokens count for the bias",
            _PATCHES_LAUNCH,
            "beside.view(batch, tokens, 16)[:, 0] = 0",
            "beside.view(batch, tokens, 16)[:, 1] = 0",
        ),
        (
            "the CLS token has the gradient of the first patch",
            _PATCHES_LAUNCH,
            "of_position, of_position[0]",
            "of_position, of_position[1]",
        ),
        (
            "the image's gradient is turned over the diagonal",
            _PATCHES_LAUNCH,
            "permute(0, 3, 1, 4, 2, 5)",
            "permute(0, 3, 1, 5, 2, 4)",
        ),
        (
            "a remainder at the edge counts as a patch",
            _PATCHES_LAUNCH,
            "depth, tokens, width // side),",
            "depth, tokens, -(-width // side)),",
        ),
    )
)


_BLOCK_LAUNCH = "crossvit_kernels/transformer_block/triton_launch.py"
BLOCK_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the MLP's drop-path is left out backward",
            _BLOCK_LAUNCH,
            "scale=scale2, norm=None, channels=channels",
            "scale=None, norm=None, channels=channels",
        ),
        (
            "the attention's drop-path is left out backward",
            _BLOCK_LAUNCH,
            "residual=dy, also=also, scale=scale1)",
            "residual=dy, also=also)",
        ),
        (
            "the gradient does not go around the MLP",
            _BLOCK_LAUNCH,
            "residual=dy, also=also, scale=scale1)",
            "also=also, scale=scale1)",
        ),
        (
            "the gradient does not go around the attention",
            _BLOCK_LAUNCH,
            "dx.view(count, -1), residual=d_between)",
            "dx.view(count, -1))",
        ),
        (
            "fc2's weight has the gradient of GELU's input",
            _LINEAR,
            "_store(also, activate(before, ACTIVATION), ",
            "_store(also, before, ",
        ),
        (
            "the gradient for proj is not scaled",
            _LINEAR,
            "scaled = value if scale is None else value * scale[:, None]",
            "scaled = value",
        ),
        (
            "the second LayerNorm has the statistics of the first",
            _BLOCK_LAUNCH,
            "for x in (first, second)),",
            "for x in (first, first)),",
        ),
        (
            "the second LayerNorm has the eps of the first backward",
            _BLOCK_LAUNCH,
            "before(saved.rows2, saved.statistics2, norm2, fc1, eps[1])",
            "before(saved.rows2, saved.statistics2, norm2, fc1, eps[0])",
        ),
        (
            "the weights' gradients lack the means of the rows",
            _BLOCK_LAUNCH,
            "means=norm.deferred,",
            "means=False,",
        ),
        (
            "what is beside the rows lacks their deviation",
            _LINEAR_ROWS,
            "_store_beside(to, mean, rstd, m, m < rows)",
            "_store_beside(to, mean, rstd * 0.0 + 1.0, m, m < rows)",
        ),
        (
            "normalised rows are taken for those before the LayerNorm",
            _BLOCK_LAUNCH,
            "deferred = not normalised and linear.defers(x, folded)",
            "deferred = linear.defers(x, folded)",
        ),
        (
            "the rows behind the first LayerNorm are saved for the second",
            _BLOCK_LAUNCH,
            "(first.rows, second.rows) if mixed",
            "(first.rows, first.rows) if mixed",
        ),
        (
            "the gradient behind GELU is scaled by the rows wherever there is a LayerNorm",
            _LINEAR,
            "        if SCALED:\n            value *= rstd[:, None]\n",
            "        if NORM:\n            value *= rstd[:, None]\n",
        ),
    )
)

_FROZEN_GPU = "crossvit/frozen_gpu.py"
FROZEN_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the second stream does not wait for the first",
            _FROZEN_GPU,
            "            self._after(main, self.side)\n",
            "",
        ),
        (
            "the fusion does not wait for the second stream",
            _FROZEN_GPU,
            "            self._after(self.side, main)\n",
            "",
        ),
        (
            "a call does not wait for one on another stream",
            _FROZEN_GPU,
            "            stream.wait_event(self._done)\n",
            "",
        ),
        (
            "a graph of the caller shares the memory of the frozen model's own",
            _FROZEN_GPU,
            "return Instance(self, self._pack(key[2], model), model, key).launched(x)",
            "return self._instances[key].launched(x)",
        ),
        (
            "memory is given back while it is used",
            _FROZEN_GPU,
            "            self._done.synchronize()\n",
            "            pass\n",
        ),
        (
            "the memory of a graph's size is kept for ever",
            _FROZEN_GPU,
            "while len(self._instances) > _KEPT:",
            "while len(self._instances) > 100:",
        ),
        (
            "what was packed is used on another stream at once",
            _FROZEN_GPU,
            "                cuda.current_stream().wait_event(self._packed[key[2]])\n",
            "",
        ),
        (
            "images are resized to what the other branch sees",
            _FROZEN_GPU,
            "layers.embed(b, images, self.seen[b], ",
            "layers.embed(b, images, self.seen[0], ",
        ),
        (
            "the heads are summed",
            "crossvit/frozen_layers.py",
            "for head in heads], dim=1) / 2",
            "for head in heads], dim=1)",
        ),
        (
            "statistics from before the fusion are used behind it",
            "crossvit/frozen_layers.py",
            "            known = block.run(tokens, room, known)\n",
            "            known = block.run(tokens, room, known or self.__dict__.get(f'known {branch}'))\n"
            "            self.__dict__[f'known {branch}'] = known\n",
        ),
        (
            "the attention's result lies where the MLP's hidden channels do",
            "crossvit_kernels/transformer_block/prepared.py",
            "narrow = _view(space.narrow, ",
            "narrow = _view(space.wide, ",
        ),
    )
)
