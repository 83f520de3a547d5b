"""CelebA-HQ at 128 pixels, from a folder: its images come at 1024, 512 or 256 as often. No labels: one class."""

from trainables.config.dataset import LARGE, DatasetInfo

DATASETS = (DatasetInfo("celeba_hq_128", "CelebA-HQ 128x128", 128, 3, 1, LARGE, images=30_000, scaled=True),)
