"""The paper's figures of trained models: their tables, drawings and grids of images, and the index of a folder."""
