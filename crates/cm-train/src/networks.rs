use std::rc::Rc;

use cm_model::{Denoiser, ImageDistance};

use crate::{Error, Result, TrainSpec, Trainable};

/// The networks that a run begins with.
pub struct Networks<M> {
    /// The network that is trained.
    pub student: M,
    /// A second network of the same architecture, needed if and only if [`crate::TargetRule::has_network`]. It starts
    /// as a copy of the student.
    pub target: Option<M>,
    /// The denoiser that is distilled, needed if and only if the settings have a `teacher`.
    pub teacher: Option<Box<dyn Denoiser>>,
    /// What LPIPS measures with, where it is the metric; see [`crate::Metric::build_with`].
    pub perceptual: Option<Rc<dyn ImageDistance>>,
}

impl<M> Networks<M> {
    /// A student alone.
    pub fn of(student: M) -> Self {
        Self { student, target: None, teacher: None, perceptual: None }
    }
}

impl<M: Trainable> Networks<M> {
    /// Settings say which networks a run needs; those that were handed in have to be these.
    pub(crate) fn check(&self, spec: &TrainSpec) -> Result<()> {
        match (spec.target.has_network(), self.target.is_some()) {
            (true, false) => return Err(no_target(spec)),
            (false, true) => {
                let remedy = "hand over Networks::target = None, or set the kind to \"ema\"";
                return Err(Error::setting(
                    "train.target.kind",
                    spec.target.name(),
                    "no target network",
                    remedy,
                ));
            }
            _ => {}
        }
        match (spec.teacher.is_some(), &self.teacher) {
            (true, None) => Err(no_teacher()),
            (false, Some(_)) => {
                let remedy =
                    "hand over Networks::teacher = None, or set train.teacher = { solver = \"heun\" }";
                Err(Error::setting("train.teacher", "none", "no teacher", remedy))
            }
            (true, Some(teacher)) => self.check_teacher(&**teacher),
            (false, None) => Ok(()),
        }
    }

    fn check_teacher(&self, teacher: &dyn Denoiser) -> Result<()> {
        let student = (self.student.shape(), self.student.num_classes());
        let got = (teacher.shape(), teacher.num_classes());
        if got == student {
            return Ok(());
        }
        let text = |(shape, classes)| format!("images of {shape} with {classes} classes");
        let input = |what, expected, got| Error::Input { what, expected, got };
        Err(input("teacher", text(student) + ", as the student has them", text(got)))
    }
}

pub(crate) fn no_target(spec: &TrainSpec) -> Error {
    let remedy = "hand a second network of the student's architecture over as Networks::target";
    Error::setting("train.target.kind", spec.target.name(), "a target network", remedy)
}

pub(crate) fn no_teacher() -> Error {
    let remedy = "hand its denoiser over as Networks::teacher, or leave train.teacher out";
    Error::setting("train.teacher", "{ solver = … }", "a teacher to distil", remedy)
}
