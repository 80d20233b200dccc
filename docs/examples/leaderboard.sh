# Train the same network without a defence, with FastClip and with Gouk's projection; attack all three; build a site that ranks
# them: site/index.html
set -e
for defence in none fastclip gouk; do
  robust-spectral finetune --model maxmin_mlp --data digits --image-size 28 --epochs 5 --lr 3e-3 \
    --defence $defence --max-norm 1 --logit-scale 30 --out runs/board/$defence --resume
  robust-spectral evaluate runs/board/$defence --attack pgd --norm l2 --eps 0.25 --eps 1 --samples 48 --gate-samples 16
done
robust-spectral leaderboard runs/board -o site
