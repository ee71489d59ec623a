#!/usr/bin/env bash
# Train the model "music" through every stage:  benchmarks/ladder.sh FOLDER [HOURS OF SOUND]
#
# Run it again and it goes on where it was stopped: every command but `data gate` resumes its own work, and none does
# anything twice. An NVIDIA GPU is used where there is one. What each stage costs, and how the results go into the
# package, is in docs/records/music.md.
set -euo pipefail
place=${1:?give a folder for sounds, latents and runs} hours=${2:-12}
sa3=${SA3:-sa3}
mkdir -p "$place"
cd "$place"

have() { [ -e "$1/index.json" ] || [ -e "$1/model/config.json" ]; }

have sounds || $sa3 data render sounds --set music --hours "$hours"
have sounds-test || $sa3 data render sounds-test --set music --hours "$hours" --test
have encoder || $sa3 train autoencoder --model music --settings music --data sounds --out encoder
have autoencoder || $sa3 train autoencoder --model music --settings music-decoder --start encoder/model --data sounds \
    --out autoencoder
$sa3 pre-encode --data sounds --autoencoder autoencoder/model --out latents --copies 1
$sa3 data gate latents --data sounds --autoencoder autoencoder/model
pretrain="$sa3 train pretrain --model music --latents latents --autoencoder autoencoder/model"
have base-short || $pretrain --settings music-short --out base-short
have base-middle || $pretrain --settings music-middle --start base-short/model --out base-middle
have base || $pretrain --settings music --start base-middle/model --out base
have clap || $sa3 train clap --settings music --model base/model --latents latents --out clap
have warmup || $sa3 train ode-warmup --settings music --model base/model --latents latents --out warmup
have posttrain || $sa3 train posttrain --settings music --model warmup/model --base base/model --clap clap/model \
    --latents latents --out posttrain
