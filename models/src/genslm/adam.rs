//! Adam: every rank updates what it holds, the same bits on every rank for what all of them hold.
//!
//! Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015.

use ndarray::{Array2, Zip};

use super::error::{Error, Result};
use super::parameters::Parameters;

/// Weights of the running means of the gradient and of its square.
const BETAS: [f32; 2] = [0.9, 0.95];
/// Keeps steps finite where gradients are 0.
const EPSILON: f32 = 1e-8;

/// The optimizer's state.
#[derive(Clone, Debug)]
pub struct Adam {
    rate: f32,
    /// Weights of the means after the steps so far.
    decay: [f32; 2],
    mean: Parameters,
    square: Parameters,
}

impl Adam {
    /// Before the first step, for weights like these.
    #[must_use]
    pub fn new(parameters: &Parameters, rate: f32) -> Self {
        let (mean, square) = (parameters.zeros_like(), parameters.zeros_like());
        Self { rate, decay: [1.0; 2], mean, square }
    }

    /// One step.
    ///
    /// # Errors
    /// [`Error::Config`] when weights or gradients are not of the shapes this was made for; nothing is changed then.
    pub fn update(&mut self, parameters: &mut Parameters, gradients: &Parameters) -> Result<()> {
        let shapes = |of: &Parameters| of.arrays().into_iter().map(Array2::dim).collect::<Vec<_>>();
        let expected = shapes(&self.mean);
        for (field, got) in [("parameters", shapes(parameters)), ("gradients", shapes(gradients))] {
            if got != expected {
                let (expected, got) = (format!("shapes {expected:?}"), format!("{got:?}"));
                return Err(Error::Config { field, expected, got });
            }
        }
        for (decay, beta) in self.decay.iter_mut().zip(BETAS) {
            *decay *= beta;
        }
        let (rate, [mean_part, square_part]) = (self.rate, self.decay.map(|decay| 1.0 - decay));
        let states = self.mean.arrays_mut().into_iter().zip(self.square.arrays_mut());
        for ((weights, gradient), (mean, square)) in
            parameters.arrays_mut().into_iter().zip(gradients.arrays()).zip(states)
        {
            Zip::from(weights).and(gradient).and(mean).and(square).for_each(|weight, &gradient, mean, square| {
                *mean += (1.0 - BETAS[0]) * (gradient - *mean);
                *square += (1.0 - BETAS[1]) * (gradient * gradient - *square);
                *weight -= rate * (*mean / mean_part) / ((*square / square_part).sqrt() + EPSILON);
            });
        }
        Ok(())
    }
}
