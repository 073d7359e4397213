"""What a run does not import. torch.compile's machinery takes 1.6 s and 140 MB, sympy 0.4 s and 30 MB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fastlm

PROGRAM = """
import sys
import torch
import fastlm

llama = dict(position="rotary", norm="rms_norm", activation="swiglu", bias=False)
models = {
    "gpt": fastlm.GPT(fastlm.GPTConfig.preset("nano", vocab_size=65, **llama)),
    "encoder": fastlm.Encoder(fastlm.EncoderConfig(vocab_size=65, n_layer=1, n_head=2, n_embd=32)),
    "lstm": fastlm.LSTMLM(65, 32, 32, 1),
}
ids = torch.randint(65, (2, 16))
for name, model in models.items():
    optimizer = fastlm.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        output = model(ids)
        while not isinstance(output, torch.Tensor):
            output = output[0]
        output.square().mean().backward()
        fastlm.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    type(model).from_pretrained(f"{sys.argv[1]}/{name}")
models["gpt"].eval().generate(ids, 4)
names = ["torch._dynamo", "torch._inductor", "matplotlib"]
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):  # torch 2.6 imports it to draw a model's weights
    names.append("sympy")
print([name for name in names if name in sys.modules])
"""


def test_training_loading_and_generation_import_no_compiler(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_a_tree_that_was_not_built_says_so(tmp_path: Path) -> None:
    """Started in the source tree after `pip install .`, Python finds that tree, without its kernels."""
    tree = tmp_path / "fastlm"
    shutil.copytree(Path(fastlm.__file__).parent, tree, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    # What is None is not looked for: an editable installation would find the module.
    code = "import sys; sys.modules['fastlm._C'] = None; import fastlm; print(fastlm.ops.native.IMPORT_ERROR)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{tree} is a source tree that was not built" in done.stdout
    assert "RuntimeWarning: fastlm runs without its compiled kernels" in done.stderr
