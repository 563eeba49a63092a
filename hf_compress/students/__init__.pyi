"""The public names of `hf_compress.students`."""

from .shallow import from_teacher as from_teacher

__all__: list[str]
