# SAN (arXiv 2302.12242, MIT), the paper's model for segmentation, trained on an exported checkpoint with its authors' settings.
#
#   docker build --tag san - < pipeline/launch/san.Dockerfile
#   docker run --gpus all --shm-size 8G -v "$PWD/models/paper/export/openai_224-diva:/clip:ro" -v /datasets:/san/datasets -v "$PWD/san:/out" san
#
# /datasets is laid out as SAN's README says. Eight GPUs, batches of 32, 60,000 steps: about 80 GPU-hours.
# Nobody has built or run this image. Its pins are those of SAN's install.sh and requirements.txt.
FROM pytorch/pytorch:1.12.1-cuda11.3-cudnn8-devel
ENV DEBIAN_FRONTEND=noninteractive FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="7.0;8.0;8.6" WANDB_MODE=disabled
RUN apt-get update && apt-get install -y --no-install-recommends git g++ ninja-build libgl1 libglib2.0-0
RUN git clone https://github.com/MendelXu/SAN.git /san && git -C /san checkout 2ee854a03fbd7f510f3eb02ce9c25d5f10e6b4ca
WORKDIR /san
RUN pip install -r requirements.txt safetensors "git+https://github.com/facebookresearch/detectron2.git@v0.6"
# SAN's open_clip 2.16 reads PyTorch files alone. OpenAI's towers have QuickGELU, which the model's name must say.
CMD ["bash", "-euc", "python -c 'import safetensors.torch, torch; torch.save(safetensors.torch.load_file(\"/clip/open_clip_model.safetensors\"), \"/tmp/clip.pt\")'; exec python train_net.py --config-file configs/san_clip_vit_large_res4_coco.yaml --num-gpus 8 OUTPUT_DIR /out MODEL.SAN.CLIP_MODEL_NAME ViT-L-14-quickgelu MODEL.SAN.CLIP_PRETRAINED_NAME /tmp/clip.pt"]
