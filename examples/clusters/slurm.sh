#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96
#SBATCH --time=24:00:00
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'accelerate launch \
    --config_file examples/accelerate/several_nodes.yaml \
    --num_machines $SLURM_NNODES --num_processes $((8 * SLURM_NNODES)) \
    --machine_rank $SLURM_NODEID --main_process_ip $MASTER \
    train_text_to_image_curriculum.py --pretrained_model_name_or_path my_pipeline \
    --train_data_dir /shared/images --output_dir /shared/run --mixed_precision bf16 \
    --max_hours 23.5 --resume_from_checkpoint latest'
