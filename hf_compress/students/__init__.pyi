"""The public names of `hf_compress.students`."""

from .bilstm import BiLSTMForSequenceClassification as BiLSTMForSequenceClassification
from .bilstm import BiLSTMModel as BiLSTMModel
from .bilstm_config import BiLSTMConfig as BiLSTMConfig
from .embedding_start import start_embeddings_ as start_embeddings_
from .shallow import from_teacher as from_teacher

__all__: list[str]
