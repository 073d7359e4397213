"""LoRA over a whole model, and its adapters as folders of peft's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlm.models.encoder import Encoder
from fastlm.models.gpt import GPT
from fastlm.models.huggingface.configs import LLAMA_FAMILY
from fastlm.models.huggingface.names import PREFIX, folder_kind, full, sources
from fastlm.nn.linear import Linear
from fastlm.nn.lora import LoRALinear

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ("qv", "attention", "all")
_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # peft's starts that leave the model's own weights as they are
_PEFT = "base_model.model."
_BASE = "fastlm_base"  # in the file's metadata: the digests of the weights that the adapters belong to
_ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)
_MODULES = {"qv": ("attention.qkv",), "attention": ("attention.qkv", "attention.proj")}
_MODULES["all"] = (*_MODULES["attention"], "mlp.fc", "mlp.proj")


def add_lora(model: GPT | Encoder, rank: int, alpha: float = 16.0, targets: str = "qv") -> None:
    """Freeze a model and put adapters beside some of its projections (in place); only these learn then.

    Args:
        rank: of the adapters.
        alpha: their product is scaled by alpha / rank.
        targets: "qv": queries and values (where they are one matrix in the folder's format, as GPT-2's, that one),
            peft's default; "attention": all four projections; "all": those of the MLP, too.

    Raises:
        ValueError: the model has adapters already, or an option is out of range.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA needs a rank of at least 1 and a positive alpha, got {rank} and {alpha}")
    if targets not in TARGETS:
        raise ValueError(f"LoRA's targets must be one of {', '.join(TARGETS)}, got {targets!r}")
    _add(model, _targeted(model, targets), rank, alpha)


def merge(model: nn.Module) -> None:
    """Add all adapters to the weights; `unmerge` takes them out again, exactly."""
    for layer in _layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """The weights as they were before `merge`, to the bit."""
    for layer in _layers(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module) -> None:
    """Ordinary layers again, with the weights that they have now (`merge` first to keep what was learned)."""
    for name, layer in _layers(model).items():
        plain = Linear(1, 1, bias=False)
        plain.in_features, plain.out_features = layer.in_features, layer.out_features
        plain.weight, plain.bias = layer.weight, layer.bias
        _replace(model, name, plain)
    model.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return bool(_layers(model))


def has_targets(model: GPT | Encoder, targets: str) -> bool:
    """Whether a model's adapters are beside these projections, and no others."""
    found = {name: set(layer.lora_A) for name, layer in _layers(model).items()}
    return found == {name: set(parts) for name, parts in _targeted(model, targets).items()}


def rank_and_alpha(model: nn.Module) -> tuple[int, float]:
    """Of a model's adapters; (0, 0.0) without."""
    for layer in _layers(model).values():
        rank = next(iter(layer.lora_A.values())).shape[0]
        return rank, layer.scale * rank
    return 0, 0.0


def save_lora(model: GPT | Encoder, path: str | os.PathLike[str], base: str | None = None) -> None:
    """Write a folder that `load_lora` and peft's `PeftModel.from_pretrained` load.

    Args:
        base: the name or the folder of the model that the adapters belong to, for peft.

    Raises:
        ValueError: the model has no adapters, or was read from a Phi-3 folder, whose projections are packed: peft would
            not find those that the adapters are beside.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError("this model has no LoRA adapters to save")
    if isinstance(model, GPT) and model.read_from == "phi3":
        unknown = {part for layer in layers.values() for part in layer.parts} - _parts(model, "phi3").keys()
        if unknown:
            raise ValueError(
                f"the Phi-3 folder that this model was read from has no {part_name(model, min(unknown))}, beside which "
                "one of these adapters is: its projections are packed, and peft would leave it out. Save both with "
                "save_pretrained(format='fastlm'), or train adapters of the model saved as Llama (save_pretrained)"
            )
    write_adapters(model, path, base)


def write_adapters(model: GPT | Encoder, path: str | os.PathLike[str], base: str | None = None) -> None:
    """`save_lora`, whichever folder the model was read from."""
    layers = _layers(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in layers.values():
        for part in layer.parts:
            for which, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                tensors[f"{_PEFT}{part_name(model, part)}.{which}.weight"] = matrices[part].detach().cpu().contiguous()
    rank, alpha = rank_and_alpha(model)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(part_name(model, part) for layer in layers.values() for part in layer.parts),
        "fan_in_fan_out": folder_kind(model.config) == "gpt2",
        "bias": "none",
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", _BASE: " ".join(base_digests(model))})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_lora(model: GPT | Encoder, path: str | os.PathLike[str]) -> None:
    """Put the adapters of a folder, fastlm's or peft's, beside the projections of a model (in place).

    Raises:
        FileNotFoundError: the folder has no adapters.
        ValueError: they belong to another model (other names, shapes, or, where fastlm wrote them, other weights), or
            use what fastlm does not have.
    """
    folder = Path(path)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no folder of LoRA adapters: it has no {name}")
    config = _read_config(folder / ADAPTER_CONFIG)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
            digests = (opened.metadata() or {}).get(_BASE, "").split()  # of old folders one, of peft's none
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} is not a whole safetensors file: {error}") from None
    if digests and set(digests).isdisjoint(own := base_digests(model)):
        raise ValueError(
            f"the adapters in {folder} were trained beside other weights than this model's "
            f"(base {config.get('base_model_name_or_path')!r}, digest {digests[0][:12]}, this model {own[0][:12]})"
        )
    wanted, matrices = _match(model, tensors, folder)
    _add(model, wanted, config["r"], float(config["lora_alpha"]))
    with torch.no_grad():
        for module, parts in matrices.items():
            layer = model.get_submodule(module)
            for (which, part), tensor in parts.items():
                getattr(layer, which)[part].copy_(tensor)


def part_name(model: GPT | Encoder, part: str) -> str:
    """The module's name in transformers' language model, of an encoder without a head in the model that this is.

    (A part's key has no dots: torch forbids them.)
    """
    name = part.replace("/", ".")
    return name if isinstance(model, Encoder) and model.head is None else full(name, folder_kind(model.config))


def base_digests(model: nn.Module) -> list[str]:
    """SHA-256 over the weights beside which the adapters stand: as they are, in bfloat16 and in float16 (hex).

    Two models have the same weights where one of these is the same: a folder, or the one who loads it, may round them,
    and a digest survives the rounding to its own dtype. (None survives both roundings, one in each model.)
    """
    digests = [hashlib.sha256() for _ in _ROUNDINGS]
    for name, p in model.named_parameters():
        if name.endswith(("attention.qkv.weight", "wte.weight")):
            layer = model.get_submodule(name.rpartition(".")[0])
            kept = layer._unmerged if isinstance(layer, LoRALinear) and layer._unmerged is not None else p
            weight = kept.detach().float()
            for digest, dtype in zip(digests, _ROUNDINGS, strict=True):
                rounded = weight.to(dtype).cpu().contiguous()
                digest.update(name.encode() + rounded.view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest() for digest in digests]


Parts = dict[str, tuple[int, int]]


def _adaptable(model: GPT | Encoder, kind: str | None = None) -> dict[str, Parts]:
    """Of each projection in the blocks, the parts that a folder's format knows, and their rows."""
    kind = kind or folder_kind(model.config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    shapes = {n: s for n, s in shapes.items() if ".lora_" not in n}
    out = {}
    for name, source in sources(model.config, kind, shapes).items():
        parts, at = {}, 0
        for theirs, rows in zip(source.names, source.rows, strict=True):
            parts[theirs.removesuffix(".weight").replace(".", "/")] = (at, at + rows)
            at += rows
        out[name.removesuffix(".weight")] = parts
    return out


def _parts(model: GPT | Encoder, kind: str) -> dict[str, tuple[str, tuple[int, int]]]:
    """Of each part that a folder's format knows, its projection and its rows."""
    return {part: (module, rows) for module, parts in _adaptable(model, kind).items() for part, rows in parts.items()}


def _targeted(model: GPT | Encoder, targets: str) -> dict[str, Parts]:
    """Those of them that `targets` names."""
    return {
        module: parts
        if targets != "qv" or len(parts) == 1
        else {n: rows for n, rows in parts.items() if not n.endswith(("key", "k_proj"))}
        for module, parts in _adaptable(model).items()
        if module.split(".", 2)[2] in _MODULES[targets]
    }


def _add(model: GPT | Encoder, wanted: dict[str, Parts], rank: int, alpha: float) -> None:
    if has_lora(model):
        raise ValueError("this model has LoRA adapters already; merge and remove them first (merge, remove_lora)")
    model.requires_grad_(False)
    for module, parts in wanted.items():
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        _replace(model, module, LoRALinear(linear, parts, rank, alpha))


def _match(
    model: GPT | Encoder, tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Parts], dict[str, dict[tuple[str, str], Tensor]]]:
    """The parts that a file's tensors belong to; ValueError where one has no place in this model."""
    kind = folder_kind(model.config)
    if kind in LLAMA_FAMILY and any(".qkv_proj." in name or ".gate_up_proj." in name for name in tensors):
        kind = "phi3"  # the same model with packed projections
    known = {part.replace("/", "."): (module, part, rows) for part, (module, rows) in _parts(model, kind).items()}
    wanted: dict[str, Parts] = {}
    matrices: dict[str, dict[tuple[str, str], Tensor]] = {}
    for name, tensor in tensors.items():
        bare, _, rest = name.removeprefix(_PEFT).removeprefix(PREFIX[kind]).partition(".lora_")
        which = f"lora_{rest.removesuffix('.weight')}"
        if bare not in known or which not in ("lora_A", "lora_B"):
            raise ValueError(
                f"the adapters in {folder} are for another model: {name} has no place in this one "
                f"({kind}, {model.config.n_layer} layers), whose projections are such as {next(iter(known))}"
            )
        module, part, (begin, end) = known[bare]
        linear = model.get_submodule(module)
        have = tensor.shape[1] if which == "lora_A" else tensor.shape[0]
        need = linear.in_features if which == "lora_A" else end - begin
        if have != need:
            raise ValueError(
                f"the adapters in {folder} are for another model: {name} is for a width of {have}, "
                f"this model's is {need}"
            )
        wanted.setdefault(module, {})[part] = (begin, end)
        matrices.setdefault(module, {})[which, part] = tensor
    for module, parts in wanted.items():
        for part in parts:
            if {("lora_A", part), ("lora_B", part)} - matrices[module].keys():
                raise ValueError(
                    f"the adapters in {folder} are not whole: {part.replace('/', '.')} lacks one of A and B"
                )
    return wanted, matrices


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["r"], config["lora_alpha"], config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not peft's configuration of LoRA adapters: {error!r}") from None
    if config["peft_type"] != "LORA":
        raise ValueError(f"{file}: peft_type is {config['peft_type']!r}; fastlm has LORA")
    for option in (
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "alora_invocation_tokens",
    ):
        if config.get(option):
            raise ValueError(f"{file}: {option}={config[option]!r}, which fastlm does not have")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={config['bias']!r}; fastlm has 'none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise ValueError(
            f"{file}: init_lora_weights={start!r}, which may change the model's own weights too; fastlm has true, "
            f"false, {', '.join(_STARTS)}. peft's save_pretrained(path_initial_model_for_weight_conversion=...) writes "
            "adapters for the weights as they were"
        )
    return config


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
