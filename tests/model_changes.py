"""Changes of a model that what was packed of it has to notice, and those that keep it from being packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossvit import CrossViT
from tests.models import small_model, spread


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def a_block(model: CrossViT) -> Any:
    return model.blocks[0].blocks[1][0]


def _prune(model: CrossViT) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(a_block(model).mlp.fc1, "weight", 0.5)


def _with(change: Callable[[CrossViT], object], **options: Any) -> Callable[[], CrossViT]:
    def make() -> CrossViT:
        model = small_model(**options)
        change(model)
        return model

    return make


def a_hook(*args: object) -> None:
    pass


def replacing(path: str, module: Callable[[], nn.Module]) -> Callable[[CrossViT], None]:
    def change(model: CrossViT) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module())

    return change


# What a program does not stand for, and what `freeze` says of it.
REFUSED: dict[str, tuple[Callable[[], CrossViT], str]] = {
    "all-attention": (partial(small_model, fusion="all"), "fusion of blocks.0"),
    "several in a row": (partial(small_model, depth=((1, 1, 2),)), "fusion of blocks.0"),
    "average": (partial(small_model, global_pool="avg"), "global_pool='avg'"),
    "a hook": (_with(lambda m: m.norm[0].register_forward_hook(a_hook)), "norm.0 was replaced or has hooks"),
    "a hook before": (_with(lambda m: a_block(m).register_forward_pre_hook(a_hook)), r"blocks.1.0 was repl"),
    "a backward hook": (
        _with(lambda m: a_block(m).mlp.register_full_backward_hook(a_hook)),
        "0.mlp was repl",
    ),
    "a hook in the fusion": (
        _with(lambda m: m.blocks[1].fusion[0].attn.wq.register_forward_hook(a_hook)),
        "wq was replaced or has hooks; the fusion of blocks.1",
    ),
    "pruning": (_with(_prune), "fc1 was replaced or has hooks"),
    "a subclass": (_with(replacing("blocks.0.blocks.1.0.mlp.fc1", lambda: Doubled(48, 96))), "fc1 was repl"),
    "its own forward": (_with(lambda m: setattr(a_block(m), "forward", lambda x: x)), "blocks.1.0 was repl"),
    "quantised": (_with(replacing("head.0", lambda: Doubled(24, 5))), "head.0 was replaced"),
    "another activation": (_with(replacing("blocks.0.blocks.1.0.mlp.act", nn.ReLU)), "mlp.act was replaced"),
    "a scale of another sign": (
        _with(lambda m: setattr(a_block(m).attn, "scale", -0.5)),
        r"attn.scale must be positive, got -0.5",
    ),
    "approximate GELU": (
        _with(replacing("blocks.0.blocks.1.0.mlp.act", partial(nn.GELU, "tanh"))),
        "mlp.act was replaced",
    ),
    "no norm": (_with(replacing("blocks.1.blocks.0.0.norm2", nn.Identity)), r"blocks.1.blocks.0.0.norm2 was"),
    "no norms": (_with(replacing("norm", nn.Identity)), "norm was replaced"),
    "no blocks": (_with(replacing("blocks", nn.Identity)), "blocks was replaced"),
    "no norm at the end": (
        _with(lambda m: m.prune_intermediate_layers([0], prune_norm=True)),
        "norm.0 was replaced",
    ),
    "a norm without a bias": (
        partial(small_model, norm_layer=partial(nn.LayerNorm, bias=False)),
        "norm1 was replaced",
    ),
    "a norm without a gain": (
        partial(small_model, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        "norm1 was replaced",
    ),
    "a head of two layers": (
        _with(replacing("head.1", lambda: nn.Sequential(nn.Linear(48, 5)))),
        "head.1 was replaced",
    ),
    "something behind the positions": (_with(replacing("pos_drop", nn.ReLU)), "pos_drop was replaced"),
    "a dilated stem": (
        _with(replacing("patch_embed.0.proj", lambda: nn.Conv2d(3, 24, 6, stride=12, dilation=2))),
        "patch_embed.0.proj was replaced",
    ),
    "an oblong stem": (
        _with(replacing("patch_embed.0.proj", lambda: nn.Conv2d(3, 24, (12, 11), stride=12))),
        "patch_embed.0.proj was replaced",
    ),
    "a stem in groups": (
        _with(replacing("patch_embed.0.proj", lambda: nn.Conv2d(3, 24, 12, stride=12, groups=3))),
        "patch_embed.0.proj was replaced",
    ),
    "fewer heads": (
        _with(
            lambda m: (
                replacing("blocks.0.blocks.1.0.attn.qkv", lambda: nn.Linear(48, 3 * 24))(m),
                replacing("blocks.0.blocks.1.0.attn.proj", lambda: nn.Linear(24, 48))(m),
            )
        ),
        "attn has another width than its branch",
    ),
    "meta": (partial(small_model, device="meta"), "neither on the CPU nor on a CUDA device"),
    "float64": (partial(small_model, dtype=torch.float64), "float32, bfloat16 or float16: torch.float64"),
    "mixed": (_with(lambda m: m.norm.bfloat16()), "not all float32"),
}


def optimizer_step(model: CrossViT) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def _other_state(model: CrossViT) -> dict[str, Tensor]:
    return {name: value + torch.randn_like(value) * 0.1 for name, value in model.state_dict().items()}


def _scale_data(model: CrossViT) -> None:
    for p in model.parameters():
        p.data.mul_(1.2)


@torch.no_grad()
def _scale_one(model: CrossViT) -> None:
    model.blocks[1].blocks[0][0].attn.proj.weight.mul_(2)


def _write_by_numpy(model: CrossViT) -> None:
    model.head[1].weight.detach().numpy()[-1, -1] += 1


def _data_of_one(name: str) -> Callable[[CrossViT], None]:
    """A write that torch does not count, of a parameter as a whole."""

    def change(model: CrossViT) -> None:
        model.get_parameter(name).data.add_(torch.randn_like(model.get_parameter(name)))

    return change


# Of parameters, which stay where they are.
IN_PLACE: dict[str, Callable[[CrossViT], object]] = {
    "a step of an optimiser": optimizer_step,
    "load_state_dict": lambda m: m.load_state_dict(_other_state(m)),
    "data of all": _scale_data,
    "one without a gradient": _scale_one,
    "NumPy": _write_by_numpy,
    **{
        f"data of {name}": _data_of_one(name)
        for name in (
            *("cls_token_0", "pos_embed_1", "patch_embed.0.proj.weight", "patch_embed.1.proj.bias"),
            *("blocks.0.blocks.0.0.norm1.weight", "blocks.0.blocks.1.1.norm2.bias", "norm.0.bias"),
            *("blocks.1.blocks.1.0.attn.qkv.bias", "blocks.1.blocks.1.0.mlp.fc2.weight", "head.1.bias"),
            *(
                "blocks.0.projs.0.0.weight",
                "blocks.0.fusion.1.attn.wv.weight",
                "blocks.1.revert_projs.0.2.bias",
            ),
        )
    },
}


def _new_tensor_as_data(model: CrossViT) -> None:
    model.norm[1].weight.data = torch.randn_like(model.norm[1].weight)


OTHERWISE: dict[str, Callable[[CrossViT], object]] = {
    "load_state_dict, assigned": lambda m: m.load_state_dict(_other_state(m), assign=True),
    "a new parameter": lambda m: setattr(m, "cls_token_0", nn.Parameter(torch.randn(1, 1, 24))),
    "other data": _new_tensor_as_data,
    "a new submodule": replacing("blocks.0.blocks.1.0.mlp.fc1", lambda: nn.Linear(48, 96)),
    "a wider submodule": lambda m: (
        replacing("blocks.0.blocks.1.0.mlp.fc1", lambda: nn.Linear(48, 200))(m),
        replacing("blocks.0.blocks.1.0.mlp.fc2", lambda: nn.Linear(200, 48))(m),
    ),
    "a new block": lambda m: m.blocks[0].blocks[1].append(copy.deepcopy(a_block(m))),
    "a block less": lambda m: m.blocks[0].blocks[1].pop(1),
    "an encoder less": lambda m: m.blocks.pop(1),
    "pruned": lambda m: m.prune_intermediate_layers([0], prune_head=False),
    "no bias": lambda m: setattr(a_block(m).attn.proj, "bias", None),
    "another dtype": lambda m: m.to(torch.bfloat16),
    "channels last": lambda m: (m.to(memory_format=torch.channels_last), _scale_one(m)),
    "a head of other classes": lambda m: setattr(
        m, "head", nn.ModuleList([nn.Linear(24, 9), nn.Linear(48, 9)])
    ),
    "reset_classifier": lambda m: (m.reset_classifier(11), spread(m)),
    "no classifier": lambda m: m.reset_classifier(0),
    "another scale": lambda m: setattr(a_block(m).attn, "scale", 1.7),
    "another eps": lambda m: setattr(a_block(m).norm2, "eps", 0.5),
    "eps of the heads": lambda m: setattr(m.norm[1], "eps", 0.5),
    "other heads": lambda m: setattr(a_block(m).attn, "num_heads", 8),
}
