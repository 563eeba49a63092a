"""Make Hugging Face transformer models smaller and faster; open the result with plain `from_pretrained`.

Public names are listed in `__init__.pyi`, where editors and type checkers read their signatures. Each is imported
when it is first used, so `import hf_compress` takes almost no time.
"""

from importlib import import_module

import lazy_loader
from wrapt import register_post_import_hook


__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# transformers imports its quantizer registry, and torch with it, only when a model class is first touched. Importing
# the loader before that would make `import hf_compress` import both.
register_post_import_hook(lambda _: import_module("hf_compress.loading"), "transformers.quantizers.auto")

# For the same reason the BiLSTM student joins the Auto classes when transformers has imported their tables.
for _table, _module in (("configuration_auto", "bilstm_config"), ("modeling_auto", "bilstm")):
    register_post_import_hook(
        lambda _, name=f"hf_compress.students.{_module}": import_module(name), f"transformers.models.auto.{_table}"
    )
