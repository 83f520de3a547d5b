"""The downsampled ImageNet, from a folder."""

from trainables.config.dataset import LARGE, DatasetInfo

DATASETS = (DatasetInfo("imagenet32", "ImageNet 32x32", 32, 3, 1000, LARGE, images=1_281_167),)
