# Train a timm model on the digits, fine-tune it without and with clipping, attack both models, and write a page with the results.
# If started again, the script does only the steps that are not done yet.
set -e
robust-spectral finetune --model test_resnet --data digits --image-size 16 --epochs 5 --lr 3e-3 --max-norm inf --out runs/digits/start --resume
robust-spectral finetune --model test_resnet --data digits --image-size 16 --epochs 3 --lr 2e-3 --freeze-bn \
  --initial-checkpoint runs/digits/start/model.safetensors --max-norm 2 --logit-scale 20 --twin --out runs/digits/twins --resume
robust-spectral evaluate runs/digits/twins --attack pgd --norm l2 --eps 0.25 --eps 0.5 --samples 48 --gate-samples 16
robust-spectral report runs/digits/twins
