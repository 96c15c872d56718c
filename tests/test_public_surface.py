"""What users may rely on: names, the signature of Pipeline, and a package that loads nothing heavy by itself."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import llama_infer
from llama_infer import Pipeline

NAMES = """
DEFAULT_PROCESSORS DEFAULT_STOPPING Batch Chat Chunk Completion Context LlamaInferError Message Output Param Pipeline
Plan Request Stop TokenLogprob installed register transform_logits
""".split()

ARGUMENTS = """
model='demo' tokenizer=None revision=None dtype=None device=None device_map=None attention=None quantization=None
adapter=None merge_adapter=True local_files_only=False tp_plan=None
loader='auto' formatter='auto' sampler='categorical' strategy='sample' cache='slots' backend='local' observers=()
batch_size=None prefix_cache=8192 compile=False trust_remote_code=False
""".split()


def test_public_names():
    assert sorted(llama_infer.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(llama_infer, name) is not None and name in dir(llama_infer)
    with pytest.raises(AttributeError, match="transfrom_logits"):
        llama_infer.transfrom_logits  # noqa: B018


def test_signature_of_pipeline():
    parameters = dict(inspect.signature(Pipeline).parameters)
    assert parameters.pop("processors").default == llama_infer.DEFAULT_PROCESSORS
    assert (
        parameters.pop("stopping").default
        == llama_infer.DEFAULT_STOPPING
        == ("end", "length", "text", "regex", "max_time", "loops")
    )
    assert parameters.pop("params").kind is inspect.Parameter.KEYWORD_ONLY
    assert sorted(f"{name}={p.default!r}" for name, p in parameters.items()) == sorted(ARGUMENTS)
    assert [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY] == ["model"]


@pytest.mark.parametrize(
    "code",
    [
        "import llama_infer",
        "import llama_infer; llama_infer.Request('hi'); llama_infer.installed(); llama_infer.Pipeline",
        "from llama_infer.pipeline import declared_params; assert 'temperature' in declared_params()",
    ],
)
def test_no_torch_is_loaded(code):
    heavy = "{'torch', 'transformers', 'numpy', 'tokenizers', 'safetensors', 'jinja2'}"
    check = f"{code}\nimport sys\nassert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_module_of_it():
    """Names are bound on first use: what costs time to import is imported when it is needed."""
    check = "import sys, llama_infer; print(*sorted(m for m in sys.modules if m.startswith('llama_infer')))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["llama_infer"]
