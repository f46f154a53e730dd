"""Distribution `ascend-vlm`: the packages models, convert, quant and runtime."""

from pathlib import Path

from setuptools import find_packages, setup

# msmodelslim's wheel has binaries for Python up to 3.12, imports transformers, and lists neither
QUANT = ["msmodelslim==26.1.0; python_version < '3.13'", "transformers>=4.57.1"]
UI = ["gradio>=6.20,<7", "openai>=1"]
RAY = ["ray[data]>=2.50,<3"]
# torch that exports the vision encoder; torch_npu of the same release decodes with any from 2.7 on
CONVERT = ["torch>=2.13,<2.14"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.7", "prometheus-client>=0.20"]

setup(
    name="ascend-vlm",
    version="0.1.0",
    description="GLM-family multimodal and chat models from released checkpoint to proven inference on Huawei Ascend NPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(
        include=[
            "models",
            "models.*",
            "convert",
            "convert.*",
            "quant",
            "quant.*",
            "runtime",
            "runtime.*",
        ]
    ),
    package_data={
        "models": ["released/*.json"],
        "convert": ["*/*.json"],
        "runtime": [
            "bench/*.html",
            "predict/*.html",
            "compare/report/templates/*",
            "doctor/*.json",
            "ops/cpu/kernels/*",
        ],
    },
    entry_points={"console_scripts": ["ascend-vlm = runtime.console:main"]},
    install_requires=[
        "torch>=2.7,<2.15",
        "numpy>=1.26",
        "pillow>=10",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "tokenizers>=0.20",
        "tiktoken>=0.7",
        "jinja2>=3.1.6",
        "onnx>=1.17",
        "onnxscript>=0.6",
        "onnx-ir>=0.1",
        "onnxruntime>=1.20",
        "matplotlib>=3.8",
        "rich>=13",
    ],
    extras_require={
        "transformers": ["transformers>=4.57.1"],
        "convert": CONVERT,
        "quant": QUANT,
        "serve": SERVE,
        "ui": UI,
        "ray": RAY,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff>=0.9",
            "openai>=1",
            "httpx>=0.27",
            *CONVERT,
            *SERVE,
            *QUANT,
        ],
    },
)
