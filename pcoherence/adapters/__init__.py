"""The loss and its measures inside other libraries; import the module that you need.

    sentence_transformers   CoherenceDistillationLoss, for SentenceTransformerTrainer
    lightning               DistillationModule and CoherenceCallback
    metric_learning         its distances as metric=, a loss for its wrappers
    torchmetrics            CoherenceMetric
    features                FeatureExtractor, for timm, torchvision and any other module

Nothing is imported here, and `import pcoherence` imports none of them. Extras
install their packages: [sentence-transformers], [lightning], [metric-learning], [torchmetrics], and
[timm] for features.
"""
