"""Prints every dependency of users at its floor, as pip takes them, with those of the extras that tests use."""

import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

EXTRAS = ("defaults", "tasks", "compare", "suites", "parquet", "cluster")

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for line in [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]:
    requirement = Requirement(line)
    (floor,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
    print(f"{requirement.name}=={floor}")  # noqa: T201
