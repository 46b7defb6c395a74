"""What a model will take and how fast it will be, computed before anything is exported.

Data flows one way: `devices` and `models` say what there is, `edge.bundle.weights` counts bytes by
part, `memory` and `speed` turn them into a plan, `engine` reads what a built
engine says of its steps, `plan` makes one for every quantization, `picture` draws it, `recommend`
chooses. `published` holds what others measured.
"""
