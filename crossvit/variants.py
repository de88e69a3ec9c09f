"""The table of models. One row drives construction, names, weights, preprocessing and documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One published CrossViT. Pairs are (S, L): the branch of small patches, the branch of large ones.

    Attributes:
        name: canonical name: timm's, where timm has the model.
        aliases: further names: IBM's, and a short one.
        image_sizes: pixels a side that each branch sees; the model's input has the first.
        widths: channels C of each branch.
        heads: attention heads of each branch.
        depth: (S blocks, L blocks) of each multi-scale encoder; there are three encoders.
        mlp_ratio: hidden width of the MLPs over C.
        three_conv_stem: the dagger models' patch embedding, three convolutions instead of one.
        crop: fraction of the resized image that the centre crop keeps at evaluation.
        parameters: recounted, position embeddings and CLS tokens included.
        gmacs: recounted multiply-accumulates of one image in 1e9 (convolutions, linear layers, attention
            products); the paper calls these FLOPs.
        published: parameters in millions and FLOPs in 1e9 as the paper's Tables 2-4 print them.
        top1: ImageNet-1k accuracy in percent: the paper's, and timm's measurement of the released weights.
        released: whether IBM and timm distribute weights.
    """

    name: str
    aliases: tuple[str, ...]
    image_sizes: tuple[int, int]
    widths: tuple[int, int]
    heads: int
    depth: tuple[int, int]
    mlp_ratio: int
    three_conv_stem: bool
    crop: float
    parameters: int
    gmacs: float
    published: tuple[float, float]
    top1: tuple[float, float | None]
    released: bool = True

    patch_sizes: tuple[int, int] = (12, 16)
    encoders: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def timm_hub_id(self) -> str | None:
        return f"timm/{self.name}.in1k" if self.released else None

    @property
    def ibm_file(self) -> str | None:
        return f"{self.aliases[0]}.pth" if self.released else None


def _row(
    name: str,
    widths: tuple[int, int],
    heads: int,
    depth: tuple[int, int],
    mlp_ratio: int,
    counted: tuple[int, float],
    published: tuple[float, float],
    top1: tuple[float, float | None],
    sizes: tuple[int, int] = (240, 224),
    released: bool = True,
) -> Variant:
    """A row under timm's name; IBM's name carries the size of L; the short one drops (240, 224)."""
    name = f"crossvit_{name}"
    stem = name.removesuffix(f"_{sizes[0]}")
    short = (stem,) if sizes == (240, 224) else ()
    return Variant(
        name=name,
        aliases=(f"{stem}_{sizes[1]}", *short),
        image_sizes=sizes,
        widths=widths,
        heads=heads,
        depth=depth,
        mlp_ratio=mlp_ratio,
        three_conv_stem="dagger" in name,
        crop=0.875 if sizes[0] == 240 else 1.0,
        parameters=counted[0],
        gmacs=counted[1],
        published=published,
        top1=top1,
        released=released,
    )


_ROWS = (
    #    name             widths       heads depth mlp  counted                published       top-1
    _row("tiny_240", (96, 192), 3, (1, 4), 4, (7_014_800, 1.5627), (6.9, 1.6), (73.4, 73.352)),
    _row("small_240", (192, 384), 6, (1, 4), 4, (26_856_272, 5.6156), (26.7, 5.6), (81.0, 81.036)),
    _row("base_240", (384, 768), 12, (1, 4), 4, (105_025_232, 21.1915), (104.7, 21.2), (82.2, 82.212)),
    _row("9_240", (128, 256), 4, (1, 3), 3, (8_553_296, 1.8408), (8.6, 1.8), (73.9, 73.994)),
    _row("15_240", (192, 384), 6, (1, 5), 3, (27_528_464, 5.7906), (27.4, 5.8), (81.5, 81.522)),
    _row("18_240", (224, 448), 7, (1, 6), 3, (43_271_408, 9.0312), (43.3, 9.03), (82.5, 82.390)),
    _row("9_dagger_240", (128, 256), 4, (1, 3), 3, (8_776_592, 1.9790), (8.8, 2.0), (77.1, 76.990)),
    _row("15_dagger_240", (192, 384), 6, (1, 5), 3, (28_209_008, 6.1123), (28.2, 6.1), (82.3, 82.302)),
    _row("18_dagger_240", (224, 448), 7, (1, 6), 3, (44_266_976, 9.4732), (44.3, 9.5), (82.8, 82.494)),
    _row(
        "15_dagger_408", (192, 384), 6, (1, 5), 3,
        (28_500_080, 21.3986), (28.5, 21.4), (83.5, 83.842), sizes=(408, 384),
    ),
    _row(
        "18_dagger_408", (224, 448), 7, (1, 6), 3,
        (44_606_560, 32.4091), (44.6, 32.4), (83.9, 84.198), sizes=(408, 384),
    ),
    _row(
        "18_dagger_504", (224, 448), 7, (1, 6), 3,
        (44_887_904, 56.602), (44.9, 56.6), (84.1, None), sizes=(504, 480), released=False,
    ),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
_BY_ANY_NAME = {name: row for row in _ROWS for name in row.names}


def find_variant(name: str) -> Variant:
    """The row of a model under any of its names; timm's ".in1k" after it is allowed.

    Raises:
        ValueError: no model has that name.
    """
    try:
        return _BY_ANY_NAME[name.removesuffix(".in1k")]
    except KeyError:
        raise ValueError(f"there is no model {name!r}; known are {', '.join(_BY_ANY_NAME)}") from None
