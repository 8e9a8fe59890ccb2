"""All readers, by name."""

from tests.fuzz import bodies, files

TARGETS = {target.name: target for target in (*bodies.TARGETS, *files.TARGETS)}
