"""A tensorflow-datasets builder of three short texts (it must live in a package to be built)."""

import numpy as np
import tensorflow_datasets as tfds


class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "size": np.int32}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(["one text", "two\ntexts", "three"]), "test": self._generate_examples(["four"])}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"text": text, "size": len(text)}
