"""The client of a vopd teacher: ask it for scores (`vopd_client.teacher`, no torch), or train a student with them.

Where things are, in the order in which a training step needs them:

    the command     cli, config, errors, types
    the teacher     teacher/ (over the wire), local_teacher and local_engine (in this process), handshake,
                    show and scored_text (for people)
    prompts         prompts, prompt_rows, render, verify
    the student     student, model_files, output_head, linear_logprobs
    rollouts        rollouts/
    scores          scoring, alignment, batch
    the objective   losses, loss_inputs, baselines, variance
    the loop        trainer, schedule, optimization, step_metrics, processes, interruption
    around it       preparation and teaching (before the first step), periodic_evaluation, ending (after the last)
    evaluation      evaluation, held_out_kl, teacher_greedy, eval_command
    on disk         run_directory, checkpoint, tracking
    the report      report, run_data, plots
"""
