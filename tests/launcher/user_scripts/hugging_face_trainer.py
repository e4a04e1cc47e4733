"""Trains a tiny BERT classifier with the Hugging Face Trainer.    torchrun hugging_face_trainer.py"""

import os
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Tokens(Dataset):
    def __init__(self, size):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(5, 60, (size, 10), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[0] > 30).long()}


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def main():
    set_seed(4)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    losses = Losses()
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory, max_steps=10, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, ddp_backend="gloo", disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=Tokens(80), callbacks=[losses])
        trainer.train()
    if args.process_index == 0:
        torch.save({"model": model.state_dict(), "losses": losses.values}, os.environ.get("OUTPUT", "out.pt"))


if __name__ == "__main__":
    main()
