"""The lowest versions that pyproject.toml says will do, as constraints for pip: `scripts/test.sh --lowest`."""

import re
import tomllib
from pathlib import Path


def floors(pyproject: str) -> list[str]:
    """A "name==version" for each requirement that has a lowest version, those of the extras too."""
    project = tomllib.loads(pyproject)["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    found = (re.match(r"([\w.-]+)(?:\[.*?\])?[^;]*?>=\s*([\w.]+)", requirement) for requirement in wanted)
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    print(*floors((Path(__file__).parent.parent / "pyproject.toml").read_text()), sep="\n")
