//! tilefold's side: operands and results on the device, one launch each way.

use anyhow::{Context, Result};
use tilefold::{Device, Gradients, Options, Tensor};
use tilefold_benches::{Launch, Operands};
use tilefold_conformance::values::Host;

use crate::task::{GRADIENTS, Task};
use crate::turns::Contender;

/// A planned attention on a device.
pub(crate) struct Launched {
    launch: Launch,
    gradients: bool,
}

impl Launched {
    pub(crate) fn new(device: &Device, task: &Task, gradients: bool) -> Result<Self> {
        let tensor = |host: &Host| Tensor::from_f64(&host.values, host.dtype, &host.shape);
        let inputs = &task.inputs;
        let mut operands = Operands::new(tensor(&inputs.q)?, tensor(&inputs.k)?, tensor(&inputs.v)?);
        operands.biases.push(tensor(&inputs.biases[0])?);
        operands.d_out = gradients.then(|| tensor(&inputs.d_out)).transpose()?;
        let wanted = if gradients { GRADIENTS } else { Gradients::default() };
        Ok(Self { launch: Launch::new(device, operands, &Options::default(), wanted)?, gradients })
    }
}

impl Contender for Launched {
    fn run(&mut self) -> Result<()> {
        self.launch.forward()?;
        if self.gradients {
            self.launch.backward()?;
        }
        Ok(())
    }

    fn results(self: Box<Self>) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let launch = self.launch.into_host()?;
        let mut results = vec![("out", launch.forward_results().out.to_f64()?)];
        if let Some(backward) = launch.backward_results() {
            let gradients = [("dq", &backward.dq), ("dk", &backward.dk), ("dv", &backward.dv)];
            for (name, tensor) in gradients.into_iter().chain([("dbias0", &backward.dbiases[0])]) {
                results.push((name, tensor.as_ref().with_context(|| format!("no {name}"))?.to_f64()?));
            }
        }
        Ok(results)
    }
}
