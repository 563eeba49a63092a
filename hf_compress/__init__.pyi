"""The public names. `hf_compress/__init__.py` reads this list; nothing else repeats it."""

from . import students as students
from .api import compress as compress
from .api import rebuild as rebuild
from .api import steps_of as steps_of
from .api import to_plain as to_plain
from .core.cost import Cost as Cost
from .core.cost import count_cost as count_cost
from .core.record import CompressionConfig as CompressionConfig
from .export.folder import export_onnx as export_onnx
from .export.onnx_model import OnnxModel as OnnxModel
from .layer_by_layer import compress_folder as compress_folder
from .methods import METHODS as METHODS
from .methods.layer_selection import LayerSelectionConfig as LayerSelectionConfig
from .methods.linformer import LinformerConfig as LinformerConfig
from .methods.structured_pruning import StructuredPruningConfig as StructuredPruningConfig
from .methods.token_pruning import TokenPruningConfig as TokenPruningConfig
from .methods.token_pruning.callbacks import StageSwitchCallback as StageSwitchCallback
from .methods.token_pruning.callbacks import ThresholdAnnealingCallback as ThresholdAnnealingCallback
from .methods.vocabulary_pruning import VocabularyPruningConfig as VocabularyPruningConfig
from .methods.weight_pruning import Acceleration as Acceleration
from .methods.weight_pruning import HeldZerosCallback as HeldZerosCallback
from .methods.weight_pruning import WeightPruningCallback as WeightPruningCallback
from .methods.weight_pruning import WeightPruningConfig as WeightPruningConfig
from .methods.weight_pruning import accelerate_for_inference as accelerate_for_inference
from .methods.weight_pruning import slim as slim
from .methods.weight_quantization import WeightQuantizationConfig as WeightQuantizationConfig
from .report.latency import Latency as Latency
from .report.latency import measure_latency as measure_latency
from .report.quality import evaluate_model as evaluate_model
from .report.tokens import trace_tokens as trace_tokens
from .report.tokens import write_token_page as write_token_page
from .students.bilstm import BiLSTMForSequenceClassification as BiLSTMForSequenceClassification
from .students.bilstm_config import BiLSTMConfig as BiLSTMConfig
from .tasks.arguments import DataArguments as DataArguments
from .tasks.inputs import calibration_batches as calibration_batches
from .tasks.pair_inputs import PairCollator as PairCollator
from .tasks.pair_inputs import encode_pairs as encode_pairs
from .tasks.pair_inputs import read_pairs_separately_ as read_pairs_separately_
from .tasks.perplexity import perplexity as perplexity
from .tasks.sources import load_task as load_task
from .training.arguments import DistillationArguments as DistillationArguments
from .training.arguments import JointTeacherArguments as JointTeacherArguments
from .training.arguments import SnapshotTeacherArguments as SnapshotTeacherArguments
from .training.collator import TeacherStudentCollator as TeacherStudentCollator
from .training.distillation import DistillationTrainer as DistillationTrainer
from .training.joined import join_trainers as join_trainers
from .training.joint_teacher import JointTeacherTrainer as JointTeacherTrainer
from .training.proximal import ProximalTrainer as ProximalTrainer
from .training.proximal_arguments import ProximalArguments as ProximalArguments
from .training.snapshot_teacher import SnapshotTeacherTrainer as SnapshotTeacherTrainer
from .training.trainer import CompressionTrainer as CompressionTrainer
from .vocabulary import prune_vocabulary as prune_vocabulary
from .vocabulary import trim_tokenizer as trim_tokenizer

__version__: str
__all__: list[str]
