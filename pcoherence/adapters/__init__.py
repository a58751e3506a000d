"""The loss and its measures inside other libraries; import the module that you need.

    sentence_transformers   CoherenceDistillationLoss, for SentenceTransformerTrainer
    lightning               DistillationModule and CoherenceCallback
    metric_learning         its distances as metric=, a loss for its wrappers
    torchmetrics            CoherenceMetric
    features                FeatureExtractor, for timm, torchvision and any other module

Nothing is imported here, and `import pcoherence` imports none of them. Each has an extra that
installs its package: pip install pcoherence[lightning], and so on.
"""
