"""One sentence for each number of a monitor: what it is, its range, when it misleads. Statistics of matrices have their
own, in `lightning_lowrank.statistics`.

Names are patterns, of which the first that fits holds: `*` stands for anything.
"""

from fnmatch import fnmatchcase

SENTENCES = {
    # Their names end as those of what stands beside others.
    "multifractal_width_over_floor": "Width of the spectrum over that of identical neurons; about 1 if alike; a "
    "ratio of two noisy numbers.",
    "ntk_distance_to_start": "1 minus the cosine with the first kernel; 0 to 1; 0 is lazy; other examples change it, "
    "too.",
    "concentration_*_top_share": "What the largest tenth of units has; 0.1 to 1; large units have more of any sum.",
    "anatomy_stability_to_start": "Cosine of the gradient's first direction with that of the first sample; 0 to 1; "
    "falls where two are equal.",
    # What stands beside others.
    "*_error": "Standard error of the number of that name; 0 or more; small where samples depend on each other.",
    "*_chance": "What chance alone gives for the number of that name; a level and no limit: noise crosses it.",
    "*_floor": "What identical units would give for the number of that name; a level, crossed by noise.",
    "*_start": "The number of that name at the first sample, or since then; misleads if the run was resumed elsewhere.",
    "*_start_*": "The number of that name since the first sample; misleads if the run was resumed elsewhere.",
    "*_random_walk": "What a random walk of as many points gives for the number of that name; a level, not a limit.",
    # Curvature.
    "curvature_valid": "1 if products with the Hessian passed their tests, else 0; 1 does not prove them exact.",
    "curvature_*_defect": "Relative error of products with the Hessian in a test; 0 or more; kinks of ReLU make it "
    "large.",
    "batch_sharpness_over_threshold": "Curvature along the gradient over the largest stable one; about 1 at the "
    "edge; misleads under Adam.",
    "batch_sharpness": "Curvature of one batch along its own gradient; any number; misleads if batches are very small.",
    "sharpness_over_threshold": "Largest eigenvalue, scaled as the optimizer scales, over the largest stable one; 1 "
    "is the edge; above 1 for short times is usual.",
    "*_lambda_max": "Largest eigenvalue of the operator; any number for the Hessian, else 0 or more; depends on how "
    "weights are scaled.",
    "ntk_*trace": "Sum of the eigenvalues of the kernel; 0 or more; grows with the scale of the outputs.",
    "*_layer_trace": "Sum of the eigenvalues of one parameter's block; any number; an estimate with its error beside "
    "it.",
    "*_trace": "Sum of all eigenvalues; any number for the Hessian, else 0 or more; an estimate whose error can "
    "exceed it.",
    "*_squared_norm": "Sum of the squares of all eigenvalues; 0 or more, as an estimate also below; ruled by the "
    "largest.",
    "*_eigenspace_overlap": "Squared cosine of the top eigenvectors with those of the last sample; 0 to 1; falls "
    "where eigenvalues are equal.",
    "*_top_share": "Share of the top eigenvectors that lies in one parameter; 0 to 1; large parameters have more by "
    "chance.",
    "*_in_top": "Share of the vector in the last sample's top eigenvectors; 0 to 1; read it beside its chance level.",
    "gauss_newton_participation_ratio": "How many directions the operator has; 1 or more; a ratio of two estimates.",
    "*fisher_participation_ratio": "How many directions the operator has; 1 or more; limited by the rows of the batch.",
    "critical_multiple": "How many times the last update could be longer before the loss rises; above 0; of one batch.",
    "critical_sharpness": "Curvature along the update by the loss itself; above 0; of one batch and one direction.",
    "anatomy_*participation_ratio": "How many directions inputs, error signals or gradient have; 1 or more; limited "
    "by the rows that are kept.",
    "ntk_*participation_ratio": "How many modes rule the kernel; 1 to its size; limited by the few examples in it.",
    "ntk_*effective_rank_energy": "Exponential of the entropy of the kernel's eigenvalues; 1 to its size; limited by "
    "the few examples in it.",
    "ntk_*energy_rank": "Modes that hold 90 % of the kernel's trace; 1 to its size; jumps by whole numbers.",
    "ntk_condition": "First over last of the top eigenvalues; 1 or more; depends on how many are computed.",
    "ntk_centred_label_alignment": "How far the centred kernel ranks examples as labels do; 0 to 1; few examples "
    "raise it.",
    "ntk_label_alignment": "How far the kernel ranks examples as labels do; 0 to 1; a constant in the kernel hides it.",
    "ntk_velocity": "1 minus the cosine with the kernel of the last sample; 0 to 1; other examples change it, too.",
    "ntk_time_constant*": "Steps in which a mode would be learnt at this rate; above 0; holds for plain descent only.",
    "ntk_modes_learnt": "Modes whose time is over; 0 to the kernel's size; assumes a kernel that stays as it is.",
    "ntk_label_energy*": "Share of the labels that the top modes hold; 0 to 1; read it beside its chance level.",
    "ntk_layer_share": "Share of the kernel that one parameter makes; 0 to 1; large parameters have more.",
    "ntk_layer_velocity": "1 minus the cosine of one parameter's kernel with its last; 0 to 1; noisy for small shares.",
    # Multifractals.
    "multifractal_dispersion": "How unlike neurons are in what surrounds them; 0 if alike; noise alone is taken off.",
    "multifractal_alpha0": "How fast neighbours of a neuron become more with the radius; above 0; few radii mislead.",
    "multifractal_width": "Largest minus smallest exponent of neurons; 0 or more; noise alone gives a width.",
    "multifractal_c2_excess": "Slope of the variance beyond counting noise; 0 if neurons are alike; a difference, "
    "and small beside its error.",
    "multifractal_*_dimension": "Dimension of the neurons as a set; above 0; few radii mislead.",
    "multifractal_asymmetry": "Whether the spectrum leans to small or large exponents; any number; noise if it is "
    "narrow.",
    "multifractal_scaling_fit": "Worst fit of the lines behind the spectrum; up to 1; a good fit does not prove "
    "scaling.",
    "multifractal_decades": "Range of radii of the fit; above 0; below 1 no spectrum means much.",
    "multifractal_kept_share": "Share of neurons that are counted; 0 to 1; those far from all others are left out.",
    "multifractal_valid": "1 if there are enough radii and the spectrum is concave, else 0; 1 proves no multifractal.",
    # Anatomy of gradients.
    "anatomy_loss": "Loss of the rows that were looked at; any number; of few rows.",
    "anatomy_spike_dominance": "Part of inputs beside that of errors; 0 to 1, NaN where neither rules; jumps near 0.5.",
    "anatomy_spike_overlap": "How well the first component of inputs shows the true one; 0 to 1; assumes one spike.",
    "anatomy_spike_strength": "Size of the first component of inputs beside noise; 0 or more; assumes one spike.",
    "anatomy_residue": "Share of the gradient from few directions of the error; 0 to 1; read it beside its chance "
    "level.",
    "anatomy_interpolant": "Share from few directions of both error and inputs; 0 to 1; read it beside its chance "
    "level.",
    "anatomy_spike": "Share of the gradient from directions that all inputs share; 0 to 1; read it beside its chance "
    "level.",
    "anatomy_bulk": "Share of the gradient from neither; 0 to 1; read it beside its chance level.",
    "anatomy_phase_shift": "1 once inputs rule the gradient where errors did before, else 0; one noisy sample sets it.",
    "anatomy_low_rank_share": "Share of the gradient in as many directions as outputs and one; 0 to 1; high for any "
    "narrow layer.",
    "anatomy_*stable_rank": "How many directions rival the first of inputs, errors or gradient; 1 or more; blind to "
    "small directions.",
    "anatomy_signals_limit": "1 if error signals have fewer directions than inputs, else 0; flips where both are near.",
    "anatomy_horn": "How far top directions of errors and inputs meet in the gradient; 0 to 1; small also by chance.",
    "anatomy_alignment": "How far the gradient lies in the inputs' top directions; 0 to 1; read it beside its chance "
    "level.",
    "anatomy_stability": "Cosine of the gradient's first direction with an earlier one; 0 to 1; falls where two are "
    "equal.",
    "anatomy_deviation": "Part of the gradient that errors times inputs do not explain; 0 or more; an estimate from "
    "8 directions.",
    "anatomy_gap_ratio": "First over second eigenvalue of the inputs' covariance; 1 or more; inflated by few rows.",
    "anatomy_rows_per_dimension": "Rows that are kept over the width; above 0; below 1 ranks are limited by rows.",
    "anatomy_num_residues": "Directions of the error that stand out; 0 or more; depends on the rows that are kept.",
    "anatomy_num_spikes": "Directions of the inputs that stand out; 0 or more; depends on the rows that are kept.",
    "anatomy_bulk_decay": "Exponent of the power law of the inputs' covariance; 0 to 3; assumes that there is one.",
    # Concentration.
    "concentration_*_count": "How many units there are; a constant of the network, which says nothing of training.",
    "concentration_*gini": "Inequality of units; 0 if all are equal, near 1 if one has all; grows with their number.",
    "concentration_*_participation_ratio": "How evenly units share; 1/n to 1; ruled by the largest unit.",
    "concentration_*_entropy": "How evenly units share; 0 to 1; blind to a single outlier among many.",
    "concentration_*_hill_exponent": "How light the tail of units is; above 0; means little for few units or no "
    "power law.",
    "concentration_*_matthew_slope": "Whether large units grow faster; 0 if size does not matter, 1 if in "
    "proportion; needs several samples.",
    "concentration_*_rank_persistence": "Whether the same units stay large; -1 to 1, 0 by chance; noisy for few units.",
    "concentration_weight_sparsity_*": "Share of weights that hardly matter to the norm; 0 to 1; 0.27 for Gaussian "
    "ones.",
    "concentration_mask_hamming_*": "Share of weights that have entered or left the largest; 0 to 1; weights near "
    "the threshold come and go.",
    "concentration_mask_jaccard_*": "How alike the largest weights are to those before; 0 to 1; read it beside its "
    "chance level.",
    "concentration_mask_early_bird_*": "How far masks still move; 0 once settled, 0.5 if steady; needs several "
    "samples.",
    "concentration_head_importance": "Sensitivity of the loss to a gate on a head; 0 or more; of one batch, first "
    "order.",
    # Units, noise, loss.
    "dormant_share": "Share of units far below the mean of their layer; 0 to 1; of one batch: rare units look dormant.",
    "dormant_inactive": "Share of units that are 0 for all inputs; 0 to 1; of one batch: rare units look dead.",
    "noise_scale": "Batch size at which noise equals the gradient; above 0, NaN if noise hides it; noisy: read the "
    "error.",
    "noise_signal_share": "Share of the true gradient in that of the batch; up to 1, as an estimate also below 0; a "
    "mean over samples, so it lags.",
    "noise_variance": "Variance of the batch's gradient; 0 or more; a mean over samples, so it lags.",
    "noise_gradient_energy": "Squared length of the true gradient; as an estimate also below 0; a mean, so it lags.",
    "noise_examples": "Examples in a step; above 0; a constant of the loader.",
    "noise_samples": "Samples in the means; 1 or more; few make the other numbers noisy.",
    "step_loss": "Loss of the step; any number; of one batch: look at medians over several.",
    "step_gradient_norm": "Length of the whole gradient before clipping; 0 or more; ruled by the layer with the "
    "largest.",
    # Representations, attention, activations.
    "representation_effective_rank": "How many directions features use, the mean among them; 1 or more; few rows "
    "limit it.",
    "representation_centred_effective_rank": "How many directions features differ in; 1 or more; few rows limit it.",
    "representation_alpha": "Exponent of the decay of the features' spectrum; any number; assumes a power law.",
    "representation_alpha_fit": "How well a power law fits; 0 to 1; high for many spectra that are none.",
    "representation_rows": "Rows that features were read from; a constant of the batch.",
    "representation_width": "Columns of the features; a constant of the network.",
    "qk_update_second_order*rank*": "How many directions the second-order part of a head's update has; 0 or more; of "
    "one step.",
    "qk_update_*rank*": "How many directions a step changes of a head's query-key product; 0 or more; of one step.",
    "attention_max_logit": "Largest attention logit of a head; any number; one token can make it.",
    "attention_largest_logit": "Largest attention logit of all heads; any number; one token can make it.",
    "attention_entropy": "How widely a head looks, in nats; 0 to the logarithm of the keys; early tokens have few "
    "keys.",
    "attention_sink_share": "Attention to the first token; 0 to 1; early tokens have little else to look at.",
    "attention_rows": "Rows of attention that were read; a constant of the batch.",
    "activation_rms": "Size of a block's output; 0 or more; grows with depth in residual networks.",
    "activation_growth": "Output of a block over its input; 0 or more; near 1 for a residual block whatever it adds.",
    "activation_depth_growth": "Output of a block over the input of the first; 0 or more; depends on its place.",
    "activation_write_ratio": "What a block adds beside what it gets; 0 or more; a residual stream that grows lowers "
    "it.",
    "activation_branch_ratio": "What one branch adds beside what the block gets; 0 or more; branches may cancel.",
    "activation_write_defect": "Part of what a block adds that its branches do not explain; 0 or more; not a fault "
    "itself.",
    "activation_gradient_gain": "Gradient before a block over that behind it; 0 or more; 1 for a block that does "
    "nothing.",
    "activation_massive_ratio": "Largest channel over the median one; 1 or more, 0 if that is zero; one channel "
    "makes it.",
    "activation_massive_count": "Channels a hundred times the median; 0 or more; they are usual in large language "
    "models.",
    "activation_kurtosis": "How unequal channels are; 1 to their number; ruled by the largest channel.",
    "activation_dormant_share": "Share of channels far below their mean; 0 to 1; one massive channel makes others "
    "dormant.",
    "activation_row_uniformity": "How alike rows of a weight are in size; 0 to 1; near 1 also at random.",
    "activation_alignment": "Cosine of what a block writes with what the next reads; 0 to 1; of top directions only.",
    # Routers, widths, trajectories, ranks that are given.
    "router_effective_experts": "How many experts share the tokens; 1 to their number; 1 also if nothing was routed.",
    "router_load_variation": "Spread of the experts' loads over their mean; 0 or more; few tokens make it large.",
    "router_entropy": "How undecided the router is, in nats; 0 to the logarithm of the experts; even loads can hide "
    "it.",
    "router_idle_share": "Share of experts without a token; 0 to 1; of one step: with few tokens some are idle by "
    "chance.",
    "router_dropped_share": "Share of places that no expert took; 0 to 1; depends on the capacity that was set.",
    "router_gate_stable_rank": "How many directions rival the first of the gate's weight; 1 or more; blind to small "
    "ones.",
    "router_experts": "How many experts there are; a constant of the network.",
    "router_tokens": "How many tokens were routed; a constant of the batch.",
    "coordinate_change": "Change of a layer's outputs by one update; 0 or more; read it over several widths.",
    "coordinate_size": "Size of a layer's outputs; 0 or more; read it over several widths.",
    "trajectory_explained_*": "Share of the path in its first directions; 0 to 1; a random walk has much of it, too.",
    "trajectory_participation_ratio": "How many directions the path uses; 1 or more; a random walk has 2.5.",
    "trajectory_straightness": "Distance from start to end over the length of the path; 0 to 1; falls with more "
    "points.",
    "trajectory_snapshots": "Points of the path that are kept; a constant of the choice of cadence.",
    "advisor_moved": "Share of a weight that has changed; 0 or more; counts noise as change.",
    "advisor_rank": "Rank that the budget gives this matrix; 0 or more; moves with all others.",
    "advisor_captured": "Share of the change that this rank holds; 0 to 1; high also for a change that is only noise.",
}


def sentence(name: str) -> str:
    """What a number is, its range, and when it misleads; nothing for what is not ours.

    Examples:
        >>> sentence("dormant_share")
        'Share of units far below the mean of their layer; 0 to 1; of one batch: rare units look dormant.'
    """
    return next((says for pattern, says in SENTENCES.items() if fnmatchcase(name, pattern)), "")
