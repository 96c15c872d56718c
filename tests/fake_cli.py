"""``llama-infer`` with a pipeline that needs no model, as a process of its own, for the tests of the command line."""

from __future__ import annotations

import sys

import fake_pipeline

import llama_infer.pipeline
from llama_infer.cli import main

if __name__ == "__main__":
    llama_infer.pipeline.Pipeline = fake_pipeline.FakePipeline  # type: ignore
    code = main()
    if "torch" in sys.modules:
        sys.exit("torch was loaded")
    sys.exit(code)
