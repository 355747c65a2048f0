"""The package map only (the metadata are in pyproject.toml): root folders become subpackages of `seqzoo`."""

from setuptools import find_packages, setup

FOLDERS = ("zoo", "blocks", "kernels", "pipelines", "conf", "model_cards")
packages = ["seqzoo"]
for folder in FOLDERS:
    packages += [f"seqzoo.{folder}"] + [f"seqzoo.{folder}.{p}" for p in find_packages(folder)]
setup(packages=packages, package_dir={"seqzoo": "seqzoo", **{f"seqzoo.{f}": f for f in FOLDERS}})
