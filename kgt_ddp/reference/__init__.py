"""The reference process and the trainer's side of it.

A reference is a process of the node that holds recent copies of the model, runs them forward on CPU cores that training
does not need, and answers with plasticity scores. The trainer talks to it through `client.ReferenceClient`, hands it
`samples.Samples`, and never waits for it.

    client ──model, weights, samples──▶ worker ──▶ pairing ──▶ runner
           ◀────────── scores ────────

`protocol` and `arena` are what both sides share: messages over a Unix socket, bulk data in sealed anonymous memory.
"""
